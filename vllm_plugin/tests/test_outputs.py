"""What vLLM answers is what `generate` of the adapter on its backbone answers."""

import statistics

import pytest
from engines import FOLDER, Case, ask, engine, tokens_of


CASES = (
    "qwen2-p2",
    "qwen2-p8",
    "qwen3-p2",
    "llama-p4",
    "mistral-p2",
    "phi3-p2",
    "olmo2-p2",
    "qwen3_moe-p2",
    "published-p2",
)
LARGEST_DIFFERENCE = 1e-3


def differences(outputs, expected):
    """Of the log probabilities of chosen tokens, and of those of the prompts."""
    for output, chosen, given in zip(outputs, expected["logprobs"], expected["prompt_logprobs"]):
        answer = output.outputs[0]
        yield from (
            step[token].logprob - value for step, token, value in zip(answer.logprobs, answer.token_ids, chosen)
        )
        prompt = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], given, strict=True)
        yield from (step[token].logprob - value for step, token, value in prompt)


def check(llm, expected):
    outputs = ask(llm, expected["prompts"], logprobs=1, prompt_logprobs=1)
    assert tokens_of(outputs) == expected["tokens"]
    assert max(map(abs, differences(outputs, expected))) < LARGEST_DIFFERENCE


@pytest.mark.parametrize("name", CASES)
def test_answers_and_log_probabilities_are_those_of_generate(name):
    case = Case(name)
    with engine(case.folder) as llm:
        check(llm, case.adapted)
    assert case.adapted["tokens"] != case.backbone["tokens"]


def test_a_real_model_answers_as_its_adapter_does():
    reason = FOLDER / "smollm2-p4" / "unavailable.txt"
    if reason.is_file():
        pytest.skip(reason.read_text())
    case = Case("smollm2-p4")
    with engine(case.folder) as llm:
        check(llm, case.adapted)
    assert case.adapted["logprobs"] != case.backbone["logprobs"]


def test_one_stream_is_a_plain_model_that_needs_no_plugin(monkeypatch):
    case = Case("qwen2-p1")
    with engine(case.folder) as llm:
        assert llm.llm_engine.model_config.architecture == "Qwen2ForCausalLM"
        check(llm, case.adapted)


def test_half_precision_gives_log_probabilities_near_those_of_float32():
    case = Case("bfloat16-p4")
    with engine(case.folder, dtype="auto") as llm:
        outputs = ask(llm, case.adapted["prompts"], prompt_logprobs=1)
    found, given, plain = (
        [value for prompt in prompts for value in prompt]
        for prompts in (
            [
                [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:])]
                for output in outputs
            ],
            case.adapted["prompt_logprobs"],
            case.backbone["prompt_logprobs"],
        )
    )
    assert mean_difference(found, given) < 0.3 * mean_difference(plain, given)  # 0.13 was seen


def mean_difference(values, others):
    return statistics.fmean(abs(value - other) for value, other in zip(values, others, strict=True))


class TestOneEngine:
    @pytest.fixture(scope="class")
    def llm(self):
        # 64 blocks of 16 are all there is: the null block, one of the prefix, and 62 that are given out again and again.
        with engine(Case("qwen2-p4").folder, num_gpu_blocks_override=64, enable_prefix_caching=True) as llm:
            yield llm

    def test_answers_stay_right_when_every_block_was_taken_many_times(self, llm, four_streams):
        for round_number in range(6):
            # Other prompts in every round, so that nothing is found in the cache.
            ask(llm, [[5 + round_number, *prompt] for prompt in four_streams.adapted["prompts"]])
            check(llm, four_streams.adapted)

    def test_requests_come_and_go(self, llm, four_streams):
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
        waiting = list(enumerate(four_streams.adapted["prompts"]))
        found = {}
        while waiting or llm.llm_engine.has_unfinished_requests():
            if waiting:  # one more request every step
                index, prompt = waiting.pop()
                llm.llm_engine.add_request(f"request-{index}", {"prompt_token_ids": prompt}, parameters)
            for output in llm.llm_engine.step():
                if output.finished:
                    found[int(output.request_id.split("-")[1])] = list(output.outputs[0].token_ids)
        assert [found[index] for index in sorted(found)] == four_streams.adapted["tokens"]

    def test_a_cached_prompt_gives_the_same_answer(self, llm, four_streams):
        llm.reset_prefix_cache()
        longest = max(four_streams.adapted["prompts"], key=len)
        first, second = ask(llm, [longest])[0], ask(llm, [longest])[0]
        assert (first.num_cached_tokens, second.num_cached_tokens) == (0, len(longest) // 16 * 16)
        assert tokens_of([first]) == tokens_of([second])

    def test_the_cache_can_be_emptied(self, llm, four_streams):
        ask(llm, four_streams.adapted["prompts"])
        assert llm.reset_prefix_cache()

    def test_samples_with_a_seed_are_reproducible(self, llm, four_streams):
        prompts = four_streams.adapted["prompts"][:3]
        once, again, other = (
            [[list(answer.token_ids) for answer in output.outputs] for output in ask(llm, prompts, **options)]
            for options in ({"temperature": 1, "n": 2, "seed": seed} for seed in (7, 7, 8))
        )
        assert once == again != other
        assert all(len(answers) == 2 and answers[0] != answers[1] for answers in once)

    def test_nothing_of_the_longest_length_is_lost(self, llm, four_streams):
        prompt = (four_streams.adapted["prompts"][-1] * 2)[:127]
        (output,) = ask(llm, [prompt], max_tokens=50)
        assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 128


def test_chunks_of_a_prompt_give_the_same_answer(four_streams):
    with engine(four_streams.folder, max_num_batched_tokens=32, max_num_seqs=8, enable_prefix_caching=False) as llm:
        assert llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens == 8
        check(llm, four_streams.adapted)


def test_a_cached_token_takes_the_room_of_all_streams_and_the_log_says_so(four_streams, said):
    room = {}
    for name, num_prefix_tokens in {"qwen2-p1": 0, "qwen2-p4": 16}.items():
        with engine(Case(name).folder, block_size=16 if num_prefix_tokens else 32) as llm:
            cache = llm.llm_engine.vllm_config.cache_config
            # One block is vLLM's null block.
            room[name] = (cache.num_gpu_blocks - 1) * cache.block_size - num_prefix_tokens
    assert room["qwen2-p4"] == pytest.approx(room["qwen2-p1"] / 4, rel=0.01)
    sentence = f"The cache has room for {room['qwen2-p4']} tokens in all streams, behind a prefix of 16."
    assert any(line.startswith(sentence) for line in said)
