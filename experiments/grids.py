"""Every setting of the study, in one place: what study.py runs."""

from collections.abc import Callable
from typing import NamedTuple

# {run}, {seed} and {source} in a command are filled in. Models that a run needs, and does not train itself, are in
# models/<grid>/inputs/<run>.


EARLIER = "--ppo-epochs 1 --no-query-kl --kl-coef 0.15 --kl-start 4"  # the default when these grids were run
UNGUARDED = f"{EARLIER} --no-kl-guard"  # for runs that may break
ABOUT_THE_JUDGE = "--reference-samples 64"  # an evaluation that does not need the optimum of every reward


class Grid(NamedTuple):
    episodes: int  # of a run
    variants: dict[str, str]  # name -> flags of `script`
    evaluation: str = ""  # flags of evaluate_nlg.py
    shared: str = EARLIER  # flags of `script` in every variant; a variant's own come after them
    script: str = "finetuning_nlg.py"
    setup: Callable[[str], list[str]] = lambda variant: []  # variant -> commands to run before its runs


def train_generator(variant: str) -> list[str]:
    """gpt2_3x192 -> a generator from scratch, of 3 layers of 192."""
    model = "scratch:{}:{}".format(*variant.rsplit("_", 1))
    out = "--out models/models/inputs/{run}/nlg --results data_results/models/{run}"
    return [f"train_nlg.py --model {model} {out} --seed {{seed}}"]


REAL = "models/data/inputs/{run}"
JUDGE = f"--gold {REAL}/judge"
REAL_LENGTHS = "--query-length 16 --response-length 48"  # real texts are longer than the shipped ones
SEED_OF = {"reward": "1{seed}", "judge": "2{seed}"}


def train_on_real_data(variant: str) -> list[str]:
    """A generator, a reward model, and a judge with a different seed and different training rows."""
    generator = f"train_nlg.py --data {REAL}/rows/texts --out {REAL}/nlg --results {REAL} {REAL_LENGTHS} --epochs 6"
    flags = "--epochs 4 --revisit 1 --label-smoothing 0"  # people's labels have noise
    classifier = f"train_cls.py --model {REAL}/nlg {flags} --results data_results/data/{{run}}"
    return [
        f"experiments.real_data {variant} --source {{source}} --out {REAL}/rows",
        f"{generator} --seed {{seed}}",
        *(
            f"{classifier} --data {REAL}/rows/{name} --out {REAL}/{name} --seed {seed}"
            for name, seed in SEED_OF.items()
        ),
    ]


PASSES = {100: 120, 1000: 36, 9360: 12}  # of a classifier over its texts, by their number; 9,360 are all of them


def train_classifier(variant: str) -> list[str]:
    """100_rows_... -> a classifier like the default one, trained on 100 labelled texts."""
    rows = int(variant.split("_")[0])
    out = "--out models/rewards/inputs/{run}/reward --results data_results/rewards/{run}"
    return [f"train_cls.py --rows {rows} --epochs {PASSES[rows]} {out} --seed {{seed}}"]


SUPERVISED = "models/start/inputs/{run}"


def train_without_ppo(variant: str) -> list[str]:
    """best_of_8 -> the policy of that variant of `beyond`, with as many sampled texts as PPO will have."""
    if variant == "reference":
        return []
    grid, half = GRIDS["beyond"], GRIDS["start"].episodes
    where = f"--out {SUPERVISED} --results data_results/start/inputs --run {{run}}"
    return [f"{grid.script} {grid.variants[variant]} {where} --episodes {half} --seed {{seed}} --resume"]


# pretrained models on film reviews; `make pretrained TASK=sentiment` first
HOME = "models/pretrained/sentiment"
ON_REVIEWS = f"--policy {HOME}/nlg --data {HOME}/rows/queries --query-length 8 --response-length 32"
REVIEWS_EVALUATION = f"--queries 32 --samples 16 --batch-size 256 --gold {HOME}/judge"
FEW_LABELS = "models/reviews/inputs/{run}/reward"
ANSWERS = f"--reward human --annotator classifier:{HOME}/judge --feedback-file models/reviews/{{run}}.jsonl"


def train_reviewer(variant: str) -> list[str]:
    """few_labels... -> a reward model as in `make pretrained TASK=sentiment`, from 300 labels instead of 3,460."""
    if not variant.startswith("few_labels"):
        return []
    flags = f"--model models/minilm --lr 5e-5 --data {HOME}/rows/reward --rows 300 --epochs 20 --seed 10"
    return [f"train_cls.py {flags} --out {FEW_LABELS} --results data_results/reviews/{{run}}"]


def epochs_and_rates(epochs: tuple[int, ...], rates: tuple[str, ...]) -> dict[str, str]:
    """K1_lr_1e-5, ...: every K with every learning rate."""
    return {f"K{k}_lr_{lr}": f"--ppo-epochs {k} --lr {lr}" for k in epochs for lr in rates}


STABILITY_ON_REVIEWS = Grid(
    1280,  # ten updates: a run that breaks does so early
    epochs_and_rates((1, 4), ("5e-5", "2e-4", "1e-3")),
    f"{REVIEWS_EVALUATION} {ABOUT_THE_JUDGE}",
    shared=f"{ON_REVIEWS} --reward {HOME}/reward --no-kl-guard --interpolate 1",
)


HUMAN = "--reward human --feedback best-of-4 --annotator gold --feedback-file models/labels/{run}.jsonl"
GRIDS = {
    # a fifth of the episodes of a default run, so that the grid is done in half an hour or two on a laptop
    "ablations": Grid(
        10_240,
        {
            "default": "",
            "constant_kl_coef": "--kl-start 1",
            "adam_lr_5e-4": "--optimizer adam --lr 5e-4",
            "sampled_kl": "--kl sampled",
            "whitened_rewards": "--whiten-rewards",
            "lambda_0.95": "--gae-lambda 0.95",
            "separate_value": "--separate-value",
            "no_critic": "--value-coef 0",
            "leave_one_out": "--leave-one-out --answers 4",
            "K2": "--ppo-epochs 2",
            "K4": "--ppo-epochs 4",
            "K4_clip_range_0.05": "--ppo-epochs 4 --clip-range 0.05",
            "K4_no_clip": "--ppo-epochs 4 --clip-range 1000",
            "minibatches_1": "--minibatches 1",
            "lr_2e-3": "--lr 2e-3",
            "batch_512": "--batch-size 512",
            "kl_coef_0.2": "--kl-coef 0.2",
            "adaptive_kl": "--kl-coef 1 --target-kl 1 --kl-horizon 2560",
        },
    ),
    "query_kl": Grid(
        56_320,
        {
            f"{inside}_kl_coef_{kl_coef}": f"--{inside} --kl-coef {kl_coef} --kl-start {0.6 / kl_coef:g}"
            for inside in ("query-kl", "no-query-kl")
            for kl_coef in (0.1, 0.15)
        },
        shared="",
    ),
    "critic": Grid(
        10_240,
        {
            "default": "",
            "warmup_4": "--critic-warmup 4",
            "value_lr_1e-2": "--value-lr 1e-2",
            "warmup_4_value_lr_1e-2": "--critic-warmup 4 --value-lr 1e-2",
            "no_critic": "--value-coef 0",
        },
        shared="",
    ),
    "beyond": Grid(
        56_320,
        {f"best_of_{n}": f"best_of_n --answers {n}" for n in (4, 8, 16)}
        | {f"reward_weighted_beta_{beta}": f"reward_weighted --beta {beta}" for beta in (0.1, 0.2, 0.5)},
        script="experiments.without_ppo",
        shared="",
    ),
    "start": Grid(
        28_160,  # the other half is what the supervised policy learned from
        {"reference": ""} | dict.fromkeys(("best_of_8", "reward_weighted_beta_0.2"), f"--start-from {SUPERVISED}"),
        shared="",
        setup=train_without_ppo,
    ),
    "overoptimisation": Grid(
        20_480,
        {f"kl_coef_{kl_coef}": f"--kl-coef {kl_coef}" for kl_coef in (0, 0.02, 0.05, 0.1, 0.2, 0.5)},
        shared="--no-kl-guard",
    ),
    "rewards": Grid(
        20_480,
        {
            f"{rows}_rows_kl_coef_{kl_coef}": f"--reward models/rewards/inputs/{{run}}/reward --kl-coef {kl_coef}"
            for rows in PASSES
            for kl_coef in (0.02, 0.15)
        },
        ABOUT_THE_JUDGE,
        shared="",
        setup=train_classifier,
    ),
    "stability": Grid(
        5120,
        epochs_and_rates((1, 2, 4, 8), ("1e-5", "1e-4", "1e-3", "3e-3", "1e-2")),  # it does not move at lower ones
        "--samples 8",
        shared=UNGUARDED,
    ),
    "stability_reviews": STABILITY_ON_REVIEWS,
    "stability_adapters": STABILITY_ON_REVIEWS._replace(
        variants=epochs_and_rates((1, 4), ("5e-4", "2e-3", "1e-2")), shared=f"{STABILITY_ON_REVIEWS.shared} --lora 8"
    ),
    "details": Grid(
        10_240,
        {
            detail: f"{detail} {UNGUARDED}"  # the detail comes first
            for detail in "nothing dropout temperature positions value_head advantages adam_eps score".split()
        },
        script="experiments.wrong",
        shared="",
    ),
    "models": Grid(
        10_240,
        {
            model: "--policy models/models/inputs/{run}/nlg"
            for model in ("gpt2_1x64", "gpt2_2x128", "gpt2_3x192", "gpt_neox_2x128", "llama_2x128")
        },
        shared="",
        setup=train_generator,
    ),
    "data": Grid(
        20_480,
        {
            name: f"--data {REAL}/rows/texts {REAL_LENGTHS} --policy {REAL}/nlg --reward {REAL}/reward {JUDGE}"
            for name in ("sentiment", "ethics")
        },
        JUDGE,
        shared="",
        setup=train_on_real_data,
    ),
    "recipe": Grid(
        5120,
        {
            "default": "",
            "no_baseline": "--no-leave-one-out",
            "critic": "--value-coef 0.01 --value-lr 1e-3 --critic-warmup 2",
            "lr_1e-5": "--lr 1e-5",
            "lr_3e-5": "--lr 3e-5",
            "lr_1e-4": "--lr 1e-4",
            "minibatches_1": "--minibatches 1 --lr 1e-4",
            "to_the_end": "--interpolate 1",
            "kl_coef_0.05": "--kl-coef 0.05",
            "kl_coef_0.2": "--kl-coef 0.2",
            "adaptive_kl": "--target-kl 2 --kl-horizon 1280",
            "kl_start_4": "--kl-start 4",
            "muon_lr_1e-4": "--optimizer muon --lr 1e-4",
            "batch_64": "--batch-size 64",
            "K2": "--ppo-epochs 2",
            "lora": "--lora 8",
            "without_fine_tuning": "--policy models/smollm2",
        },
        f"{REVIEWS_EVALUATION} --reference-samples 256",
        # the guard's copies of the weights would not fit twice
        shared=f"{ON_REVIEWS} --reward {HOME}/reward --no-kl-guard",
    ),
    "reviews": Grid(
        5120,
        {
            "default": f"--reward {HOME}/reward",
            "no_price": f"--reward {HOME}/reward --kl-coef 0",
            "few_labels": f"--reward {FEW_LABELS}",
            "few_labels_no_price": f"--reward {FEW_LABELS} --kl-coef 0",
        }
        | {f"answers_{labels}": f"{ANSWERS} --labels {labels}" for labels in (60, 250, 1000)},
        f"{REVIEWS_EVALUATION} {ABOUT_THE_JUDGE}",
        shared=f"{ON_REVIEWS} --gold {HOME}/judge --no-kl-guard --interpolate 1",  # the default then
        setup=train_reviewer,
    ),
    "labels": Grid(
        10_240,
        {
            f"{labels}_{when}": f"{HUMAN} --labels {labels} --label-rounds {rounds}"
            for labels in (60, 250, 1000, 4000)
            for when, rounds in (("offline", 1), ("online", 4))
        },
        ABOUT_THE_JUDGE,
    ),
}
