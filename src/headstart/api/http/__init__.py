"""HTTP/1.1 within limits: connections, request heads and bodies, and the server's end."""
