"""Words to token ids and back: the tokenizer and its chat template, streamed text, reasoning and tool calls."""
