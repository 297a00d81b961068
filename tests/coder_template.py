"""A chat template with the structure of Qwen3-Coder's, and tools for it. The words are ours."""

from typing import Any

CODER_TEMPLATE = """\
{%- if messages[0].role == 'system' -%}
{{- '<|im_start|>system\\n' + messages[0].content }}{%- set rest = messages[1:] -%}
{%- else -%}
{{- '<|im_start|>system\\nYou write code.' }}{%- set rest = messages -%}
{%- endif -%}
{%- if tools -%}
    {{- '\\n\\n# Functions\\n<tools>' }}
    {%- for tool in tools -%}
        {%- set tool = tool.function if tool.function is defined else tool -%}
        {{- '\\n<function>\\n<name>' ~ tool.name ~ '</name>\\n<parameters>' }}
        {%- if tool.parameters is defined and tool.parameters.properties is mapping -%}
            {%- for name, fields in tool.parameters.properties | items -%}
                {{- '\\n<parameter>\\n<name>' ~ name ~ '</name>' }}
                {%- if fields.type is defined %}{{ '\\n<type>' ~ (fields.type | string) ~ '</type>' }}{% endif -%}
                {{- '\\n</parameter>' }}
            {%- endfor -%}
        {%- endif -%}
        {{- '\\n</parameters>\\n</function>' }}
    {%- endfor -%}
    {{- '\\n</tools>\\n\\nCall one like this:\\n<tool_call>\\n<function=name>\\n<parameter=key>\\nvalue' }}
    {{- '\\n</parameter>\\n</function>\\n</tool_call>' }}
{%- endif -%}
{{- '<|im_end|>\\n' }}
{%- for message in rest -%}
    {%- if message.role == 'assistant' and message.tool_calls -%}
        {{- '<|im_start|>assistant' }}
        {%- if message.content | trim %}{{ '\\n' + message.content | trim + '\\n' }}{% endif -%}
        {%- for call in message.tool_calls -%}
            {%- set call = call.function if call.function is defined else call -%}
            {{- '\\n<tool_call>\\n<function=' + call.name + '>\\n' }}
            {%- for name, value in call.arguments | items -%}
                {%- set is_json = value is mapping or (value is sequence and value is not string) -%}
                {{- '<parameter=' + name + '>\\n' + (value | tojson if is_json else value | string) }}
                {{- '\\n</parameter>\\n' }}
            {%- endfor -%}
            {{- '</function>\\n</tool_call>' }}
        {%- endfor -%}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' -%}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response>\\n<|im_end|>\\n' }}
    {%- else -%}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""


def tool(name: str, properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a tool in OpenAI's form."""
    parameters = {"type": "object", "properties": properties, **more}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


EDIT = tool(
    "edit",
    {
        "path": {"type": "string"},
        "line": {"type": "integer"},
        "ratio": {"type": "number"},
        "dry": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "options": {"type": "object"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "limit": {"type": ["integer", "null"]},
    },
    required=["path"],
)
NOW = tool("now", {})
TOOLS = [EDIT, NOW]
