"""The flags that scripts share, and which of them go together."""

import argparse
import functools
from pathlib import Path

from rlhf import lora, precision, recipes
from rlhf.cli import COUNT, FRACTION, POSITIVE, SAMPLE_COUNT, SEED, number
from rlhf.errors import UserError


def add_machine_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("machine")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is one")
    group.add_argument(
        "--precision",
        choices=precision.PRECISIONS,
        default="auto",
        help="of matrix products. auto: bfloat16 on CUDA, and for models of 4 million weights and more on a CPU with "
        "AMX, or with AMD's avx512_bf16; float32 elsewhere",
    )
    group.add_argument("--seed", type=SEED, default=0, help="seed of every random choice")
    return group


def add_data_flags(parser: argparse.ArgumentParser, default: str) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("data")
    group.add_argument("--data", default=default, help="folder, file or hub dataset (docs/adding.md)")
    group.add_argument("--data-config", help="configuration (subset) of a hub dataset")
    group.add_argument("--data-revision", help="branch or commit of a hub dataset, such as refs/convert/parquet")
    group.add_argument(
        "--text-column",
        nargs="+",
        metavar="COLUMN[+COLUMN...]",
        help="column of the text; several joined by + make one text, several names give several texts a row",
    )
    return group


def add_model_flags(group: argparse._ArgumentGroup) -> None:
    """--lora and --activation-checkpointing, for what trains."""
    group.add_argument(
        "--lora",
        type=COUNT,
        metavar="RANK",
        help="train adapters of this rank beside the linear layers, and not the weights; the learning rate is then ten "
        "times that of Adam, unless it is given; the adapters are written to OUT/adapter, and merged to OUT",
    )
    group.add_argument(
        "--activation-checkpointing",
        action="store_true",
        help="keep the input of each layer only, and compute the rest again for the gradient: less memory, more time",
    )


def check_lora(args: argparse.Namespace, name: str, flag: str) -> None:
    """Refuse --lora for a model, which `flag` names, and with settings that do not go with it."""
    if args.lora is None:
        return
    if recipes.is_new(name):
        raise UserError(f"--lora adapts a model that has learned something, and {flag} {name} has not; train it first")
    if lora.base_of_folder(name, flag):
        raise UserError(f"--lora needs a whole model under its adapters, and {flag} {name} is adapters: give it merged")
    if Path(name).resolve() == Path(args.out).resolve():
        raise UserError(f"--lora needs the model under its adapters later too: give an --out other than {flag} {name}")
    if args.optimizer == "muon":
        raise UserError("--lora trains with Adam: Muon is for whole matrices; leave out --optimizer muon")
    if getattr(args, "separate_value", False):
        raise UserError("--lora with --separate-value would train a second body in full; leave out one of them")
    if getattr(args, "start_from", None):
        raise UserError("--lora starts with adapters that change nothing; leave out --start-from")


def add_gold_flag(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--gold",
        default=DEFAULT_GOLD,
        help="held-out judge, for evaluation only: FILE.py:FUNCTION, used where it knows the data, the folder of a "
        "second classifier, or none",
    )


def add_sampling_flags(group: argparse._ArgumentGroup, with_chat: bool = False) -> None:
    def length(flag: str, text: str) -> dict:
        of_texts, of_chat = recipes.LENGTHS[flag]
        if with_chat:
            return {"type": COUNT, "help": f"{text} (default: {of_texts}, {of_chat} with --chat)"}
        return {"type": COUNT, "help": text, "default": of_texts}

    group.add_argument("--query-length", **length("query_length", "longest query in tokens; the shortest is half"))
    group.add_argument("--response-length", **length("response_length", "longest response in tokens"))
    group.add_argument("--temperature", type=POSITIVE, default=0.7, help="divides the logits, in sampling and training")


def add_checkpoint_flags(group: argparse._ArgumentGroup, every: int) -> None:
    """--save-every, whose default is `every`, and --resume."""
    group.add_argument(
        "--save-every", type=COUNT, default=every, help="steps between checkpoints, written to OUT.checkpoint"
    )
    group.add_argument("--resume", action="store_true", help="go on from the checkpoint, if there is one")


# of finetuning_nlg.py

ppo_recipe = functools.partial(recipes.described, recipes.PPO)


def add_chat_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--chat",
        action="store_true",
        help="--data holds prompts or conversations (columns prompt, messages) for the policy's chat template; those "
        "longer than --query-length are left out, and a reply ends with the turn",
    )
    group.add_argument(
        "--reward-sees",
        choices=("both", "reply"),
        default="both",
        help="of a conversation: what was said before and the reply on the next line, or the reply alone",
    )


def fill(args: argparse.Namespace) -> None:
    """Give the flags of finetuning_nlg.py that depend on other flags their defaults."""
    if args.leave_one_out is None and (args.value_coef or args.value_lr or args.critic_warmup or args.separate_value):
        args.leave_one_out = False  # who asks for a critic gets one
    if args.leave_one_out and args.value_coef:
        raise UserError("--value-coef is for the critic, and --leave-one-out has none")
    if args.leave_one_out is False and args.answers is None:
        args.answers = 1
    if args.start_from and args.kl_start is None:
        args.kl_start = 1.0  # a high coefficient at first would take back what the policy has gained
    recipes.choose(args, recipes.LENGTHS, args.chat)
    if args.chat and args.query_kl:
        raise UserError("--query-kl is for queries that may end earlier; with --chat none does")
    if args.chat:
        args.query_kl = False
    elif args.kl == "sampled" and args.query_kl:
        raise UserError("--query-kl is a part of the exact penalty; with --kl sampled nothing is sampled in a query")
    elif args.kl == "sampled":
        args.query_kl = False
    if not args.chat and args.reward_sees != "both":
        raise UserError(f"--reward-sees {args.reward_sees} is about the replies of --chat")


def add_rollout_flags(group: argparse._ArgumentGroup) -> None:
    add_sampling_flags(group, with_chat=True)
    group.add_argument("--answers", type=COUNT, help=ppo_recipe("answers", "responses to every query of a batch"))
    group.add_argument(
        "--stop",
        help="token that ends a response (default: the tokenizer's end of text; with --chat the end of the turn)",
    )
    group.add_argument("--stop-after", type=number(int, 0), default=0, help="tokens before --stop counts")


DEFAULT_REWARD, DEFAULT_GOLD = "models/cls", "data_cls/scenarios.py:judge"


def add_reward_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--reward",
        action="append",
        metavar="[WEIGHT*]REWARD",
        help="folder or hub name of a reward model, FILE.py:FUNCTION, or human; several are standardized, weighted "
        f"and added (default: {DEFAULT_REWARD})",
    )
    samples_help = "samples of the reference that standardize scores"
    group.add_argument("--reference-samples", type=SAMPLE_COUNT, help=ppo_recipe("reference_samples", samples_help))
    group.add_argument(
        "--bounded-score",
        action="store_true",
        help="a classifier's score is its probability, not its log-odds, which have no end: what is surely positive "
        "gains nothing by more praise",
    )
    group.add_argument(
        "--missing-stop-score", type=number(float), default=-1.0, help="score of a response that does not end"
    )


def add_kl_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--kl-coef",
        type=number(float, 0),
        help=ppo_recipe("kl_coef", "KL coefficient; with --target-kl the first one"),
    )
    group.add_argument(
        "--kl-start",
        type=number(float, 1),
        help=ppo_recipe(
            "kl_start", "factor of --kl-coef at the start, falling to 1 by half of the run; not with --target-kl"
        ),
    )
    group.add_argument(
        "--kl",
        choices=("exact", "sampled"),
        default="exact",
        help="exact: over the vocabulary; sampled: of the sampled token, as lm-human-preferences has it",
    )
    group.add_argument(
        "--query-kl",
        action=argparse.BooleanOptionalAction,
        help=ppo_recipe("query_kl", "penalise the exact KL inside queries too, where a shorter query could have ended"),
    )
    group.add_argument("--target-kl", type=POSITIVE, help="adapt the coefficient to this KL, in nats a response")
    group.add_argument("--kl-horizon", type=POSITIVE, default=10_000, help="episodes over which --target-kl adapts")
    group.add_argument("--kl-limit", type=POSITIVE, default=20.0, help="a KL that is too high, in nats a response")
    guard_help = "above --kl-limit raise the coefficient, then go back, then stop; otherwise only warn"
    group.add_argument("--kl-guard", action=argparse.BooleanOptionalAction, default=True, help=guard_help)


def add_ppo_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--episodes", type=COUNT, help=ppo_recipe("episodes", "responses in all, in whole batches"))
    group.add_argument("--batch-size", type=COUNT, help=ppo_recipe("batch_size", "responses per update"))
    group.add_argument("--minibatches", type=COUNT, default=4, help="optimizer steps per pass over a batch")
    group.add_argument("--ppo-epochs", type=COUNT, help=ppo_recipe("ppo_epochs", "K, passes over a batch"))
    group.add_argument("--lr", type=POSITIVE, help=ppo_recipe("lr", "learning rate, falling to 0"))
    optimizer_help = "adam, with at most a third of muon's learning rate, is that of lm-human-preferences"
    group.add_argument("--optimizer", choices=("muon", "adam"), help=ppo_recipe("optimizer", optimizer_help))
    group.add_argument("--clip-range", type=POSITIVE, default=0.2, help="beyond it a ratio gains no more")
    group.add_argument("--value-clip-range", type=POSITIVE, default=0.2, help="the same of a value's change")
    group.add_argument("--value-coef", type=number(float, 0), help=ppo_recipe("value_coef", "weight of the value loss"))
    group.add_argument("--value-lr", type=POSITIVE, help="learning rate of the critic alone (default: --lr)")
    group.add_argument(
        "--critic-warmup", type=number(int, 0), default=0, help="updates at first in which only the critic learns"
    )
    group.add_argument(
        "--leave-one-out",
        action=argparse.BooleanOptionalAction,
        help=ppo_recipe("leave_one_out", "no critic: a value is the mean return of the other --answers to a query"),
    )
    whiten_help = "divide rewards by their deviation over the batch, as lm-human-preferences does"
    group.add_argument("--whiten-rewards", action=argparse.BooleanOptionalAction, default=False, help=whiten_help)
    group.add_argument("--discount", type=FRACTION, default=1.0, help="gamma")
    group.add_argument("--gae-lambda", type=FRACTION, default=1.0, help="lambda")
    of_line = "where --out lies on the straight line of weights from the reference, 0, to what PPO ends at, 1"
    group.add_argument("--interpolate", type=number(float, 0, 1, above=0), help=ppo_recipe("interpolate", of_line))
    group.add_argument("--forward-batch", type=COUNT, default=64, help="rows in a model at once; fewer save memory")


def add_evaluation_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--eval-every", type=COUNT, help="updates between evaluations (default: none during training)")
    group.add_argument("--keep-best", action="store_true", help="--out is the best policy of these, not the last one")
    add_gold_flag(group)


def check_ppo_flags(args: argparse.Namespace) -> None:
    """Refuse flags of finetuning_nlg.py, with the defaults of the recipe, that do not go together."""
    updates = args.episodes // args.batch_size
    if args.batch_size % args.minibatches:
        raise UserError(f"--batch-size {args.batch_size} cannot be divided into --minibatches {args.minibatches}")
    if args.stop_after >= args.response_length:
        raise UserError(f"--stop-after {args.stop_after}: no response of --response-length {args.response_length} ends")
    if args.leave_one_out and args.answers < 2:
        raise UserError("--leave-one-out compares the answers to one query: give --answers 2 or more")
    if not updates:
        raise UserError(f"--episodes {args.episodes} is less than one batch of --batch-size {args.batch_size}")
    if args.label_rounds > min(args.labels // 2, updates):
        raise UserError(f"--label-rounds {args.label_rounds} are more than there are updates or pairs of --labels")
    of_critic = {"--critic-warmup": args.critic_warmup, "--value-lr": args.value_lr}
    for flag, value in (of_critic | {"--separate-value": args.separate_value}).items():
        if value and args.leave_one_out:
            raise UserError(f"{flag} is for the critic, and --leave-one-out has none")
        if value and not args.value_coef:
            raise UserError(f"{flag} is for the critic, which --value-coef 0 teaches nothing; give --value-coef 0.1")
    if args.critic_warmup >= updates:
        raise UserError(f"--critic-warmup {args.critic_warmup} leaves none of the {updates} updates to the policy")
    if args.target_kl and args.kl_horizon < args.batch_size:
        raise UserError(f"--kl-horizon {args.kl_horizon:g} is less than --batch-size {args.batch_size}: give more")
    if args.target_kl and not args.kl_coef:
        raise UserError("--target-kl multiplies the KL coefficient, and --kl-coef 0 stays 0; give one above 0")
    if args.keep_best and not args.eval_every:
        raise UserError("--keep-best keeps the best of the policies that are evaluated: give --eval-every, too")
