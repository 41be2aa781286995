"""python -m relloc.prepare ...: checks a data set on disk and packs it into shards."""

from omegaconf import DictConfig

from relloc.runs.start_command import start_command


def run(config: DictConfig) -> None:
    """Checks the data set that `config` names, and packs it if `out` is set."""
    # Imported here, since it loads torch, which --help does not need.
    from relloc.runs import build, invocation, preparing

    preparing.prepare(build.preparing(config), invocation.Invocation.of(config))


if __name__ == "__main__":
    start_command(run, "prepare")
