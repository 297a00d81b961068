"""On two GPUs: the tokens of one, in compiled steps and CUDA graphs."""

import pytest
import torch
from conftest import randomized, small_config, write_text_checkpoint


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_two_devices_give_the_same_tokens_as_one(tmp_path, tokenizer, tokenizer_folder):
    parallel = pytest.importorskip("test_parallel", exc_type=ImportError)  # needs packages that a GPU machine may lack
    config = small_config(vocab_size=tokenizer.vocab_size, head_dim=32, hidden_size=64, eos_token_ids=())
    folder = write_text_checkpoint(tmp_path / "model", randomized(config, seed=5), tokenizer_folder)
    [one, two] = [parallel.run_processes(size, tmp_path / f"{size}.json", f"cuda={folder}") for size in (1, 2)]
    assert two[1] == [0, 0], two[2]
    parallel.assert_same_results(two[0]["cuda"], one[0]["cuda"])
