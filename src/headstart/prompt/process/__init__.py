"""The process that renders and tokenises the prompts of one model, and the server's side of it."""
