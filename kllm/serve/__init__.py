"""The HTTP server: OpenAI's API over the engine. `app.create_app` assembles it, `main.serve` runs it."""
