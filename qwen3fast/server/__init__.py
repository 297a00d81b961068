"""An OpenAI-compatible HTTP server over `Generator` (extra `server`): `python -m qwen3fast serve`.

Reading order: errors.py, fields.py, models.py, options.py, sampling.py, replies.py, stream.py, one file per family of
endpoints (chat.py, completions.py, vectors.py, tokens.py, status.py), metrics.py, limits.py, app.py, command.py.
"""
