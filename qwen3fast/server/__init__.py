"""An OpenAI-compatible HTTP server over `Generator` (extra `server`): `python -m qwen3fast serve`.

Reading order: errors.py, fields.py, models.py, options.py, sampling.py, replies.py, stream.py, chat_fields.py and
conversation.py; the endpoints (chat.py, completions.py, responses.py with response_request.py and response_items.py,
messages.py with message_request.py, vectors.py, tokens.py, status.py); metrics.py, limits.py, app.py, loading.py and
command.py.
"""
