"""python main.py --config=configs/NAME.py[:variant[,key=value...]] [--workdir=DIR] [--mode=MODE]"""

import sys
from pathlib import Path

from absl import flags

from training import cli

TASKS = {
    "train": "training.loop:train",
    "tokenizer": "input_pipeline.tokenizers:run",
    "fit": "eval.fit:run",
    "curate": "input_pipeline.curate:run",
    "runs": "training.runs:run",
}


def make_flags() -> flags.FlagValues:
    """The flags beside --config."""
    own = flags.FlagValues()
    flags.DEFINE_string("workdir", "", "folder of the run (runs/<config>-<variant>)", own)
    flags.DEFINE_enum("mode", "train", cli.MODES, "what to do", own)
    flags.DEFINE_integer("step", None, "checkpoint to use (the newest)", flag_values=own)
    flags.DEFINE_multi_string("prompt", [], "mode sample: a text; may be repeated", own)
    flags.DEFINE_multi_string(
        "image", [], "mode sample: a picture to caption, edit or rebuild", own
    )
    flags.DEFINE_string("topology", "", "mode dryrun: v5e:16x16, v5p:4x4x4, h100:8, ...", own)
    flags.DEFINE_boolean("debug_errors", False, "show the traceback of an error", own)
    return own


def run(config, own: flags.FlagValues, spec: str) -> None:
    """One mode of one config."""
    workdir = Path(own.workdir or cli.default_workdir(spec))
    cli.check_mode(own.mode, config.task)
    match own.mode:
        case "train":
            cli.task(TASKS, config, workdir)
        case "eval":
            cli.load("training.loop:evaluate")(config, workdir, own.step)
        case "sample":
            cli.load("training.loop:sample")(config, workdir, own.step, own.prompt, own.image)
        case "export":
            cli.load("export.run:run")(config, workdir, own.step)
        case "dryrun":
            cli.load("training.dryrun:run")(config, workdir, own.topology)


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 2 a user's mistake, 1 a failure, 128 + signal when stopped."""
    own = make_flags()
    if "--help" in argv or "-h" in argv:
        print(cli.overview(own))
        return 0
    if len(argv) == 1:
        print(cli.list_configs())
        return 0
    with cli.one_line_errors(debug="--debug_errors" in argv) as outcome:
        spec = cli.spec_of(argv)
        config = cli.parse(own, argv)
        cli.start(own.mode)
        run(config, own, spec)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main(sys.argv))
