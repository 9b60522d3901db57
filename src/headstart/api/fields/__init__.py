"""Fields shared by the request and answer bodies of several APIs."""
