"""Chat models: conversations from data, the chat template, what a reward sees, and the end of a turn as padding."""

import copy
import json

import pandas as pd
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import ppo
from rlhf import chat, data, models, prompting, rewards, rollout
from rlhf.errors import UserError
from rlhf.human import questions, terminal
from rlhf.policy import PolicyWithValue
from rlhf.sampling import Sampling
from tests import tiny
from tests.conftest import refused, run

CPU = torch.device("cpu")
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Is it late?"},
    {"role": "assistant", "content": "It is ten."},
    {"role": "user", "content": "Is ten late?"},
]
CONVERSATION = json.dumps(TURNS)
QUESTION = chat.from_text("Is it late?")


def chat_tokenizer(template=TEMPLATE, **special):
    """Its padding, its end of text and the end of a turn are one token, as in SmolLM2."""
    tokenizer = models.scratch_tokenizer(["system user assistant Is it late? It is ten. Be kind."] * 3)
    tokenizer.add_special_tokens(special or {"eos_token": "<|end|>", "pad_token": "<|end|>", "bos_token": "<|start|>"})
    tokenizer.chat_template = template
    return tokenizer


# from the rows of a data set


def conversations_in(tmp_path, *rows, columns=None):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [chat.to_messages(each) for each in chat.conversations_of(data.load_file(path), columns)]


def test_a_row_has_messages_or_a_prompt(tmp_path):
    answered = [*TURNS, {"role": "assistant", "content": "It is not.", "name": "A"}]
    rows = {"prompt": " Is it late? "}, {"messages": TURNS}, {"prompt": "not this", "messages": answered}
    assert conversations_in(tmp_path, *rows) == [[TURNS[1]], TURNS, TURNS]


def test_another_column_can_hold_prompts_or_messages(tmp_path):
    assert conversations_in(tmp_path, {"prompt": "no", "ask": "a b"}, columns=["ask"]) == [
        [{"role": "user", "content": "a b"}]
    ]
    assert conversations_in(tmp_path, {"turns": TURNS, "prompt": "no"}, columns=["turns"]) == [TURNS]
    assert conversations_in(tmp_path, {"text": "one"}, {"text": "two"})[1] == [{"role": "user", "content": "two"}]
    with pytest.raises(UserError, match="no column 'nope'"):
        conversations_in(tmp_path, {"prompt": "a"}, columns=["nope"])


def test_parquet_holds_messages_too(tmp_path):
    pd.DataFrame({"messages": [TURNS, TURNS[1:2]]}).to_parquet(tmp_path / "rows.parquet")
    rows = data.load_file(tmp_path / "rows.parquet")
    assert [chat.to_messages(each) for each in chat.conversations_of(rows, None)] == [TURNS, TURNS[1:2]]


USER, REPLY = TURNS[1], TURNS[2]
MALFORMED = [
    ({"prompt": " "}, "row 2 is empty"),
    ({"messages": []}, "row 2 is empty"),
    ({"messages": [REPLY]}, "row 2 has no message of the user"),
    ({"messages": [USER, {"role": "user", "content": "  "}]}, "row 2, message 2 is empty"),
    ({"messages": [{"role": "user"}]}, "row 2, message 1: a message is"),
    ({"messages": [USER, "Hello"]}, "row 2, message 2: a message is"),
    ({"messages": [{"role": "user", "content": ["a part"]}]}, "row 2, message 1: a message is"),
    ({"messages": [{"role": "tool", "content": "x"}, USER]}, "row 2, message 1: its role is 'tool'"),
    ({"messages": [USER, TURNS[0], USER]}, "row 2, message 2: its role is 'system'"),
    ({"prompt": {"content": "x"}}, "row 2: prompt holds a dict, not a text"),
]


@pytest.mark.parametrize(("row", "message"), MALFORMED)
def test_a_malformed_row_is_named(tmp_path, row, message):
    with pytest.raises(UserError, match="train, " + message):
        conversations_in(tmp_path, {"prompt": "a"}, row)


def test_a_malformed_row_is_named_with_its_split(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "valid.jsonl").write_text('{"prompt": " "}\n')
    with pytest.raises(UserError, match="valid, row 1 is empty: give it prompt, or take it out"):
        prompting.load(True, str(tmp_path))


# the template


def test_a_prompt_becomes_the_tokens_of_the_template():
    tokenizer = chat_tokenizer()
    prompts = prompting.Conversations(tokenizer, "both")
    ids, mask = prompts.encode([CONVERSATION, QUESTION], CPU)
    as_transformers_does = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True)["input_ids"]
    assert ids[0].tolist() == as_transformers_does
    short = tokenizer.decode(ids[1][mask[1].bool()])
    assert short == "<|start|>user\nIs it late?<|end|>\n<|start|>assistant\n"
    assert mask[0].all() and mask[1].tolist() == [0] * (len(ids[1]) - mask[1].sum()) + [1] * int(mask[1].sum())


@pytest.mark.parametrize(
    ("template", "special", "expected"),
    [
        (TEMPLATE, {}, "<|end|>"),
        # as in Gemma and Phi: the end of a turn is not the end of text
        (TEMPLATE, {"additional_special_tokens": ["<|start|>", "<|end|>"]}, "<|end|>"),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", {}, "<|end|>"),
        # the assistant's turn may end otherwise than the user's
        (
            "{% for m in messages %}{{ '<|start|>' if m['role'] == 'user' }} {{ m['content'] }} "
            "{{ '<|end|>' if m['role'] == 'user' else '<|over|>' }}{% endfor %}",
            {"eos_token": "<|end|>", "additional_special_tokens": ["<|start|>", "<|over|>"]},
            "<|over|>",
        ),
    ],
)
def test_the_token_that_ends_a_turn(template, special, expected):
    tokenizer = chat_tokenizer(template, **special)
    prompts = prompting.Conversations(tokenizer, "both")
    assert tokenizer.convert_ids_to_tokens(prompts.stop_token(None)) == expected
    assert tokenizer.convert_ids_to_tokens(prompts.stop_token("<|start|>")) == "<|start|>"


def test_what_a_template_refuses_is_said():
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    with pytest.raises(UserError, match=r"refuses 'Be kind\..*Is ten late.': no system message"):
        chat.render(chat_tokenizer(refusing + TEMPLATE), CONVERSATION)


# which queries there are


def conversations(count):
    return [chat.from_text(f"Is it {number}?") for number in range(count)]


def test_a_fifth_of_both_splits_is_for_evaluation_whatever_the_template():
    texts = {"train": conversations(100), "valid": conversations(150)[100:]}
    prompts = prompting.Conversations(chat_tokenizer(), "both")
    training, held_out, validation = (
        queries(texts, 64)
        for queries in (prompts.training_queries, prompts.held_out_queries, prompts.validation_queries)
    )
    assert sorted(training + held_out + validation) == sorted(conversations(150))
    assert 15 <= len(held_out + validation) <= 45  # a fifth of 150 is 30
    assert 0 <= len(held_out) - len(validation) <= 1
    other = prompting.Conversations(chat_tokenizer("{{ messages[-1]['content'] }}"), "reply")
    assert other.held_out_queries(texts, 64) == held_out


def test_long_prompts_are_left_out_and_counted(capsys):
    tokenizer = chat_tokenizer()
    length = len(tokenizer.encode(chat.render(tokenizer, QUESTION), add_special_tokens=False))
    texts = {"train": [*conversations(20), CONVERSATION], "valid": [CONVERSATION] * 2}
    prompts = prompting.Conversations(tokenizer, "both")
    longest = max(
        len(tokenizer.encode(chat.render(tokenizer, each), add_special_tokens=False)) for each in conversations(20)
    )
    training = prompts.training_queries(texts, longest)
    assert capsys.readouterr().out == f"3 of 23 prompts are longer than --query-length {longest}: left out\n"
    assert set(training) < set(conversations(20))
    prompts.training_queries({"train": conversations(20), "valid": []}, longest)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=f"--query-length 5: all prompts are longer; the shortest has {length} tokens"):
        prompts.training_queries({"train": [CONVERSATION], "valid": [QUESTION]}, 5)


# what is seen of a reply


def replies(tokenizer, *texts):
    """Response tokens [B, R] and their mask; behind the end of a turn stand more ends, as the sampler leaves them."""
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    width, end = 1 + max(map(len, rows)), tokenizer.convert_tokens_to_ids("<|end|>")
    ids = torch.tensor([row + [end] * (width - len(row)) for row in rows])
    return ids, (torch.arange(width) <= torch.tensor([[len(row)] for row in rows])).long()


@pytest.mark.parametrize(
    ("sees", "before"), [("reply", ""), ("both", "Be kind.\nIs it late?\nIt is ten.\nIs ten late?\n")]
)
def test_a_reward_sees_no_template(sees, before):
    tokenizer = chat_tokenizer()
    prompts = prompting.Conversations(tokenizer, sees)
    queries = [CONVERSATION, QUESTION]
    texts = prompts.texts(queries, *prompts.encode(queries, CPU), *replies(tokenizer, "It is ten.", "\n It is late\n"))
    assert texts == [before + "It is ten.", ("Is it late?\n" if before else "") + "It is late"]
    assert prompts.split(CONVERSATION, texts[0]) == (
        "Be kind.\nIs it late?\nIt is ten.\nIs ten late?", "Is ten late?", "It is ten."
    )  # fmt: skip
    assert prompts.readable([QUESTION]) == ["Is it late?"]


def test_an_end_of_turn_that_the_tokenizer_does_not_call_special_is_not_seen():
    tokenizer = models.scratch_tokenizer(["system user assistant Is it late? It is ten."] * 3)
    tokenizer.add_tokens(["<|start|>", "<|end|>"])  # ordinary ones, as some tokenizers have them
    tokenizer.chat_template = TEMPLATE
    prompts = prompting.Conversations(tokenizer, "reply")
    assert tokenizer.convert_ids_to_tokens(prompts.stop_token(None)) == "<|end|>"
    texts = prompts.texts([QUESTION], *prompts.encode([QUESTION], CPU), *replies(tokenizer, "It is ten."))
    assert texts == ["It is ten."]


def test_a_function_gets_the_last_message_and_the_reply(tmp_path):
    (tmp_path / "own.py").write_text(
        "def pairs(messages, replies):\n"
        "    assert (messages, replies) == (['Is ten late?'], ['It is ten.'])\n    return [3.0]\n"
        "def texts(texts):\n    return [float(len(text)) for text in texts]\n"
    )
    specs = [f"{tmp_path}/own.py:{name}" for name in ("pairs", "texts")]
    for sees, seen in (("reply", "It is ten."), ("both", chat.plain(CONVERSATION) + "\nIt is ten.")):
        prompts = prompting.Conversations(chat_tokenizer(), sees)
        reward = rewards.load(specs, -1.0, CPU, "float32", bounded=False, split=prompts.split)
        assert reward.raw_scores([CONVERSATION], [seen]).tolist() == [[3.0, len(seen)]]


def test_people_read_a_conversation_in_lines_and_answer_about_what_the_reward_sees(monkeypatch, capsys):
    prompts = prompting.Conversations(chat_tokenizer(), "both")
    before = chat.plain(CONVERSATION) + "\n"
    monkeypatch.setattr(models, "continuations", lambda *_: [before + "It is.", before + "It is not."])
    question = next(questions.draw_questions(None, prompts, [CONVERSATION], 2, None, 0, batch=1))
    assert question == questions.Question(before, ("It is.", "It is not."))
    monkeypatch.setattr(terminal, "read_key", lambda: "2")
    assert terminal.ask(questions.View(question, questions.answer_keys(2), "")) == "2"
    lines = capsys.readouterr().out.splitlines()
    assert {"Be kind.", "Is it late?", "It is ten.", "Is ten late?", "1  … It is.", "2  … It is not."} <= set(lines)


# the end of a turn is padding's token too, and is learned


def test_the_end_of_a_reply_is_rewarded_and_gets_a_gradient():
    """Advantages are 0 but on the end token, the same as padding's; its probability must rise, where it came."""
    tokenizer = chat_tokenizer()
    end = tokenizer.eos_token_id
    assert end == tokenizer.pad_token_id == prompting.Conversations(tokenizer, "both").stop_token(None)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_layer=1, n_head=2, n_embd=16, n_positions=128))
    model.config.pad_token_id = end
    with torch.no_grad():  # some replies end early
        end_weight = model.transformer.wte.weight[end]
        model.transformer.ln_f.bias.copy_(4 * end_weight / end_weight.square().sum())
    policy = PolicyWithValue(model.eval())
    prompts = prompting.Conversations(tokenizer, "both")
    queries = [CONVERSATION, QUESTION] * 8
    sampling = Sampling(16, 1.0, prompts.stop_token(None))
    rolled = rollout.collect(policy, model, *prompts.encode(queries, CPU), sampling, tiny.generator(), forward_batch=4)
    ended = rolled.terminated
    assert ended.sum() >= 2 and rolled.lengths[ended].unique().numel() > 1
    last = (torch.arange(len(queries)), rolled.lengths - 1)
    assert (rolled.response_ids[last] == end).equal(ended)
    paid = ppo.token_rewards(torch.ones(len(queries)), torch.zeros_like(rolled.logprobs), rolled.response_mask, 0.1)
    assert paid[last].eq(1).all() and paid.sum() == len(queries)

    on_ends = torch.zeros_like(rolled.logprobs)
    on_ends[last] = ended.float()
    tiny.one_update(policy, rolled, on_ends, rolled.values, lr=1e-2, temperature=1.0)
    new = rollout.evaluate(policy, model, rolled, 1.0)[0]
    assert (new[last] > rolled.logprobs[last])[ended].all()
    assert (new[rolled.response_mask == 0] == 0).all()


# the scripts


ROWS = [{"prompt": f"Is it {number}?"} for number in range(40)] + [{"messages": TURNS}, {"prompt": "late? " * 300}]
REWARD = "def late(messages, replies):\n    return [float('late' in reply) for reply in replies]\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny chat model, prompts and a reward."""
    home = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    tokenizer = chat_tokenizer()
    tokenizer.model_max_length = 512
    config = GPT2Config(vocab_size=len(tokenizer), n_layer=1, n_head=2, n_embd=16, n_positions=512)
    models.save_folder(home / "chat", GPT2LMHeadModel(config), tokenizer, "a card")
    tokenizer.chat_template = None
    models.save_folder(home / "plain", GPT2LMHeadModel(config), tokenizer, "a card")
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (home / "own.py").write_text(REWARD)
    return home


FLAGS = "--chat --policy chat --data rows.jsonl --reward own.py:late --out ppo".split()
SMALL = "--response-length 8 --episodes 16 --batch-size 16 --minibatches 2 --reference-samples 16".split()


def test_a_chat_model_is_trained_and_evaluated(home):
    said = run("finetuning_nlg", *FLAGS, *SMALL, "--run", "chat", "--eval-every", 1, cwd=home).stdout
    assert "1 of 42 prompts are longer than --query-length 256: left out" in said
    folder = home / "data_results" / "chat"
    settings = json.loads((folder / "config.json").read_text())["settings"]
    assert (settings["chat"], settings["query_length"], settings["query_kl"]) == (True, 256, False)
    samples = pd.read_csv(folder / "samples.csv", keep_default_na=False)
    known = {row["prompt"] for row in ROWS[:40]} | {chat.plain(CONVERSATION)}
    assert set(samples["query"]) <= known
    generation = json.loads((home / "ppo" / "generation_config.json").read_text())
    tokenizer = models.load_policy(str(home / "ppo"), "--policy", is_chat=True)[1]
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|end|>")
    evaluation = "--run data_results/chat --queries 4 --samples 8 --reference-samples 64".split()
    said += run("evaluate_nlg", *evaluation, cwd=home).stdout
    assert "<|" not in said and '"role"' not in said
    answers = pd.read_csv(folder / "evaluation_samples.csv", keep_default_na=False)
    assert set(answers["query"]) <= known - set(samples["query"])
    assert all(row.text.startswith(row.query + "\n") for row in answers.itertuples())
    assert not answers.text.str.contains("<|", regex=False).any()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--policy", "plain"], "its tokenizer has no chat template, which --chat needs"),
        (["--query-length", 5], "--query-length 5: all prompts are longer; the shortest has"),
        (["--query-kl"], "--query-kl is for queries that may end earlier"),
        (["--reward", "human", "--reward-sees", "reply"], "take --reward-sees both"),
        (["--data", "own.py"], "own.py is not a .csv"),
    ],
)
def test_mistakes_are_refused(home, flags, message):
    assert message in refused("finetuning_nlg", *FLAGS, *SMALL, *flags, cwd=home)


def test_what_the_reward_sees_is_of_chat_only(home):
    flags = [flag for flag in FLAGS if flag != "--chat"]
    assert "is about the replies of --chat" in refused("finetuning_nlg", *flags, "--reward-sees", "reply", cwd=home)


def test_a_missing_template_is_said_before_weights_are_loaded(home, monkeypatch):
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(UserError, match="no chat template"):
        models.load_policy(str(home / "plain"), "--policy", is_chat=True)


# SmolLM2


def test_an_update_of_smollm2_with_its_own_template(smollm2):
    model, tokenizer = smollm2
    prompts = prompting.Conversations(tokenizer, "reply")
    end = prompts.stop_token(None)
    assert (tokenizer.decode([end]), tokenizer.pad_token_id) == ("<|im_end|>", end)
    queries = [chat.from_text("What is the capital of France? Answer with one word."), CONVERSATION]
    policy = PolicyWithValue(copy.deepcopy(model))
    sampling = Sampling(12, 0.1, end)
    rolled = rollout.collect(policy, model, *prompts.encode(queries, CPU), sampling, tiny.generator(), forward_batch=2)
    assert "Paris" in prompts.texts(queries, *rolled.tokens)[0]
    assert rolled.terminated[0] and rolled.response_ids[0, rolled.lengths[0] - 1] == end
    advantages = torch.zeros_like(rolled.logprobs)
    advantages[0, rolled.lengths[0] - 1] = 1.0
    metrics = tiny.one_update(policy, rolled, advantages, rolled.values, lr=1e-5, temperature=0.1, forward_batch=2)
    assert metrics["ratio_deviation_first"] < 1e-3 and metrics["grad_norm"] > 0
