"""HTTP/1.1 with limits: connections, request heads, request bodies, and the server's shutdown."""
