"""python -m relloc.prepare: check a data set on disk, pack it into shards."""

from omegaconf import DictConfig

from relloc.runs.launch import launch


def run(config: DictConfig) -> None:
    """Check, and pack if `out` is set, what `config` says."""
    from relloc.runs import build, invocation, preparing  # torch loads here: --help does without

    preparing.prepare(build.preparing(config), invocation.Invocation.of(config))


if __name__ == "__main__":
    launch(run, "prepare")
