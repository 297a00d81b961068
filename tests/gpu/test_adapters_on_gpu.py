"""On a GPU: rows of different adapters, and of none, in one batch give the tokens of the merged models on the CPU."""

import copy

import pytest
import torch
from test_lora import ALL, modules_of, write_adapter

from gpu.conftest import DEVICE, MAX_SEQ_LEN, MODES, SLOTS, assert_captured, assert_greedy, prompts
from qwen3fast import Generator, SamplingParams
from qwen3fast.checkpoint.lora.merge import merge_lora


@pytest.mark.parametrize("mode", MODES)
def test_adapters_in_a_batch_give_the_merged_models_tokens(model, twin, mode, tmp_path):
    references, folders = {None: model}, {}
    for name, targets in (("one", ALL), ("two", ["q_proj", "up_proj"])):
        folders[name] = tmp_path / name
        write_adapter(folders[name], model, modules_of(model, targets), lora_alpha=2)
        references[name] = copy.deepcopy(model)
        merge_lora(references[name], folders[name])
    compile, graphs = MODES[mode]
    options = {"max_seq_len": MAX_SEQ_LEN, "max_batch_size": SLOTS, "compile": compile, "cuda_graphs": graphs}
    with Generator(copy.deepcopy(twin), adapters=folders, **options) as generator:
        assert generator.debug.engine.adapters.chunk_slot_R.device.type == DEVICE.type
        names = [None, "one", "two", "one", "two", None, "one", "two"]
        params = [SamplingParams(temperature=0, max_tokens=20, adapter=name) for name in names]
        for _ in range(2):  # captured, then replayed
            replies = [reply.token_ids for reply in generator.generate(prompts(), params)]
            for prompt, reply, name in zip(prompts(), replies, names, strict=True):
                with torch.no_grad():
                    assert_greedy(references[name], [prompt], [reply])
        if mode == "graphs":
            assert_captured(generator)
