"""python main.py --config=configs/NAME.py[:variant[,key=value...]] [--workdir=DIR] [--mode=MODE]"""

import sys
from pathlib import Path

from absl import flags

from training import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", "", "folder of the run (runs/<config>-<variant>)", FLAGS)
flags.DEFINE_enum("mode", "train", cli.MODES, "what to do", FLAGS)
flags.DEFINE_integer("step", None, "checkpoint to use (the newest)", flag_values=FLAGS)
flags.DEFINE_multi_string("prompt", [], "mode sample: a text; may be repeated", FLAGS)
flags.DEFINE_multi_string("image", [], "mode sample: a picture to caption or edit", FLAGS)
flags.DEFINE_string("topology", "", "mode dryrun: v5e:16x16, v5p:4x4x4, h100:8, ...", FLAGS)
flags.DEFINE_boolean("debug_errors", False, "show the traceback of an error", FLAGS)

TASKS = {
    "train": "training.loop:train",
    "tokenizer": "input_pipeline.tokenizers:run",
    "fit": "eval.fit:run",
    "curate": "input_pipeline.curate:run",
    "runs": "training.runs:run",
}


def run(config, spec: str) -> None:
    """One mode of one config."""
    workdir = Path(FLAGS.workdir or cli.default_workdir(spec))
    step = FLAGS.step
    match FLAGS.mode:
        case "train":
            cli.task(TASKS, config, workdir)
        case "eval":
            cli.load("training.loop:evaluate")(config, workdir, step)
        case "sample":
            cli.load("inference.sample:run")(config, workdir, step, FLAGS.prompt, FLAGS.image)
        case "export":
            cli.load("export.run:run")(config, workdir, step)
        case "dryrun":
            cli.load("training.dryrun:run")(config, workdir, FLAGS.topology)


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 2 a user's mistake, 1 a failure, 128 + signal when stopped."""
    if len(argv) == 1 or "--help" in argv or "-h" in argv:
        print(cli.overview(FLAGS) if "--help" in argv or "-h" in argv else cli.list_configs())
        return 0
    spec = cli.spec_of(argv)
    with cli.one_line_errors(debug="--debug_errors" in argv) as outcome:
        config = cli.parse(FLAGS, argv)
        cli.start(FLAGS.mode)
        run(config, spec)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main(sys.argv))
