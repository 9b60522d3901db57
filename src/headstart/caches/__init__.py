"""Named prompt states on disk: their files, how they were used, and the directory they live in.

Identity: a cache is (model, name); its file is the truth about it, and no copy or index is believed over it.
Sharing: a file is never changed in place. Creating writes a new one and renames it over the old, so whoever
has the old one open or mapped reads it to the end. One server owns a directory at a time.
Trust: states reach native code only after their BLAKE3 hash was checked for the file as it is now.
"""
