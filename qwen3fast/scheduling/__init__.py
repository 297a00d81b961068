"""Scheduling of requests onto the slots of the KV cache.

Read prompt.py, request.py, prefix_cache.py, first_token.py, scheduler.py, worker.py, admission.py, uncached.py,
reply.py, handle.py, dispatch.py and builder.py, in this order.
"""
