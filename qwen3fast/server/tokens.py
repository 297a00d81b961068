"""`POST /tokenize` and `POST /detokenize`, as in vLLM."""

from __future__ import annotations

import asyncio
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qwen3fast.scheduling.prompt import fitting_text
from qwen3fast.server.chat_fields import read_messages, read_tools
from qwen3fast.server.fields import Fields, read_fields, refuse_or_name
from qwen3fast.server.models import ServedModel, tokenizer_of
from qwen3fast.server.state import state_of

COUNTED_LENGTHS = 16  # times the context length: clients count tokens to decide whether to shorten


async def tokenize(request: Request) -> Response:
    """Return the token ids of a text (`prompt`) or of a conversation (`messages`).

    add_special_tokens: put before it what the tokenizer puts before a text (bos_token), if it does not begin so; by
    default for a prompt, as requests do, but not for a conversation, whose template writes them.
    """
    fields, served = await _read(request)
    tokenizer = tokenizer_of(served)
    text = fields.text("prompt")
    is_whole = fields.flag("add_special_tokens", text is not None)
    encode = tokenizer.encode_prompt if is_whole else tokenizer.encode
    if text is None:
        if fields.raw("messages") is None:
            raise fields.error("prompt", "one of prompt and messages is required", "missing_required_parameter")
        messages, (tools, _) = read_messages(fields), read_tools(fields)
        add, template = fields.flag("add_generation_prompt", True), fields.object("chat_template_kwargs")
        asked = (
            template.flag("enable_thinking", served.enable_thinking) if template is not None else served.enable_thinking
        )
        render = partial(tokenizer.apply_chat_template, messages, tools, add, enable_thinking=asked)
        text = str(await asyncio.to_thread(render))
    try:
        fitting_text(text, tokenizer, COUNTED_LENGTHS * served.max_length, None)
    except ValueError as err:
        name = "messages" if fields.raw("prompt") is None else "prompt"
        raise fields.error(name, str(err), "context_length_exceeded") from err
    ids = await asyncio.to_thread(encode, text)
    with_texts = fields.flag("return_token_strs")
    headers = refuse_or_name(fields, state_of(request).options.strict)
    body = {"tokens": ids, "count": len(ids), "max_model_len": served.max_length}
    if with_texts:
        body["token_strs"] = [tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids]
    return JSONResponse(body, headers=headers)


async def detokenize(request: Request) -> Response:
    """Return the text of token ids."""
    fields, served = await _read(request)
    ids, tokenizer = fields.required("tokens", fields.ids("tokens")), tokenizer_of(served)
    if unknown := [i for i in ids if tokenizer.base.id_to_token(i) is None]:
        raise fields.error("tokens", f"token id {unknown[0]} is not in the tokenizer's vocabulary", "invalid_value")
    headers = refuse_or_name(fields, state_of(request).options.strict)
    return JSONResponse({"prompt": tokenizer.decode(ids)}, headers=headers)


async def _read(request: Request) -> tuple[Fields, ServedModel]:
    """Return the fields and the model that they name, of any kind; by default the first one."""
    models, fields = state_of(request).models, await read_fields(request)
    name = fields.text("model")
    return fields, models.served[0] if name is None else models.find(name)
