from headstart.cli.main import app

app()
