"""What would runs of PPO have gained with other values of --interpolate? Without training again.

    python -m experiments.interpolation --run data_results/K2_lr_1e-3_seed0 --fractions 0.9 0.8

For every run, whose models must be there, and every fraction: the policy at this part of the way, in weights, from the
reference to the policy that the run ended at, in models/interpolation/, and its run folder in --results. Then evaluates
them all. Weights are float32 and the run's own fraction must be 1, so they are those that the flag would have given.
"""

from pathlib import Path

from experiments import peer_task
from experiments.commands import start
from rlhf import cli, models, outputs, runtime
from rlhf.errors import UserError
from rlhf.policy import PolicyWithValue

MODELS = Path("models/interpolation")


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--run", nargs="+", required=True, help="run folders of finetuning_nlg.py")
    parser.add_argument(
        "--fractions", nargs="+", type=cli.number(float, 0, 1, above=0), default=[0.8], help="values of --interpolate"
    )
    parser.add_argument("--results", type=cli.folder, default="data_results/interpolation", help="folder to write to")
    parser.add_argument("--evaluation", default="", metavar="FLAGS", help="of evaluate_nlg.py, in quotation marks")
    args = parser.parse_args()
    runtime.quiet_libraries()
    folders = [write(Path(run), fraction, Path(args.results)) for run in args.run for fraction in args.fractions]
    if start("evaluate_nlg.py", ["--run", *folders, *args.evaluation.split()]).returncode:
        raise UserError("evaluate_nlg.py failed; it says why above")


def write(run: Path, fraction: float, results: Path) -> Path:
    """The policy at this fraction and its run folder, which is returned."""
    config = peer_task.load_config(run)
    name = f"{run.name}_interpolate_{fraction:g}"
    settings = outputs.settings_of(config)
    if settings["interpolate"] < 1 or settings["lora"]:
        raise UserError(f"--run {run}: not for a policy that is interpolated already, or trained with --lora")
    outputs.refuse_policy_of_another_run(run, config["settings"])
    (trained, tokenizer), (reference, _) = (models.load_policy(settings[key], f"--{key}") for key in ("out", "policy"))
    PolicyWithValue(trained).interpolate(reference, fraction)
    changed = {"interpolate": fraction, "out": str(MODELS / name), "run": name, "results": str(results)}
    config |= {"settings": settings | changed}
    models.save_folder(MODELS / name, trained, tokenizer, f"{run}, --interpolate {fraction:g}.\n", config)
    runtime.write_json(results / name / "config.json", config)
    return results / name


if __name__ == "__main__":
    cli.run(main)
