"""Named prompt states on disk: their files, their usage, and the directory that holds them.

Identity: a cache is identified by namespace and name. Its file is authoritative over any copy or index.
Sharing: a file is never changed in place. Creating writes a new one and renames it over the old one; readers
that have the old one open or mapped can read it to the end. One server owns a directory at a time.
Trust: states reach native code only after their BLAKE3 hash was checked for the current file.
"""
