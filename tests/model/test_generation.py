import pytest
import torch

from lora_train.attention import VARLEN
from lora_train.config import ModelConfig
from lora_train.generation import generate_answers, generating, stop_ids, stream_answer
from lora_train.model import load_base_model, load_tokenizer

PROMPTS = [[1, *range(10, 10 + n)] for n in (9, 3, 14, 3, 6)]


@pytest.fixture(scope="module")
def loaded(model_folder):
    config = ModelConfig(path=str(model_folder("llama")))
    model = load_base_model(config, torch.float32, torch.device("cpu"))
    return model, load_tokenizer(config)


@torch.no_grad()
def continue_greedily(model, tokenizer, prompt, max_new_tokens):
    """One token at a time, without cache, padding or generate()."""
    ids = list(prompt)
    model.set_attn_implementation("eager")
    for _ in range(max_new_tokens):
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in stop_ids(model, tokenizer):
            break
        ids.append(token)
    model.set_attn_implementation(VARLEN)
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_batches_answer_like_single_steps(loaded, batch_size):
    model, tokenizer = loaded
    answers = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size)
    assert answers == [continue_greedily(model, tokenizer, p, 12) for p in PROMPTS]
    assert len(set(answers)) > 2


def test_everything_is_as_before(loaded):
    model, tokenizer = loaded
    own = model.generation_config
    model.train()
    generate_answers(model, tokenizer, PROMPTS, max_new_tokens=2, batch_size=2)
    assert model.training
    assert model.config._attn_implementation == VARLEN
    assert model.config.use_cache is False
    assert model.generation_config is own


def test_stops_at_an_end_of_turn_that_no_config_names(loaded):
    """Only the vocabulary knows <|endoftext|>, id 0, here."""
    model, tokenizer = loaded
    assert stop_ids(model, tokenizer) == [0, 2]
    head = model.lm_head.weight.data
    kept = head.clone()
    # all logits are equal, and the first is taken
    head.zero_()
    try:
        answers = generate_answers(model, tokenizer, PROMPTS[:2], max_new_tokens=50, batch_size=2)
    finally:
        head.copy_(kept)
    assert answers == ["", ""]


def test_another_librarys_call_stops_there_too(loaded):
    """As lm-evaluation-harness calls generate: without a configuration of its own."""
    model, tokenizer = loaded
    written = model.generation_config.eos_token_id
    ids = torch.tensor([PROMPTS[0]])
    with generating(model, tokenizer) as base:
        first = int(base.generate(ids, max_new_tokens=5)[0, ids.shape[1]])
    model.generation_config.eos_token_id = [2, first]
    try:
        with generating(model, tokenizer) as base:
            output = base.generate(ids, max_new_tokens=5)
    finally:
        model.generation_config.eos_token_id = written
    assert output.shape[1] == ids.shape[1] + 1


def test_a_models_own_sampling_defaults_do_not_count(loaded):
    model, tokenizer = loaded
    expected = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=8)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    try:
        answers = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=8)
    finally:
        model.generation_config.repetition_penalty = None
        model.generation_config.do_sample = None
    assert answers == expected


def test_greedy_stream_equals_batch_and_draws_are_repeatable(loaded):
    model, tokenizer = loaded
    one = stream_answer(model, tokenizer, PROMPTS[0], max_new_tokens=12)
    assert [one] == generate_answers(model, tokenizer, PROMPTS[:1], max_new_tokens=12, batch_size=1)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(
            stream_answer(model, tokenizer, PROMPTS[0], max_new_tokens=30, temperature=3.0)
        )
    assert drawn[0] == drawn[1] != drawn[2]


def test_no_inference_tensors_are_left_behind(loaded):
    """A cache built in inference mode would break the next backward pass."""
    model, tokenizer = loaded
    generate_answers(model, tokenizer, PROMPTS, max_new_tokens=2, batch_size=8)
    assert not any(buffer.is_inference() for buffer in model.buffers())
