"""The description of the API that /openapi.json gives and /docs shows. Answers are written by hand, and tests
hold them to what is said of them here."""
