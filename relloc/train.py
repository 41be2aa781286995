"""python -m relloc.train: pretrain, then evaluate frozen features beside random initialization."""

from omegaconf import DictConfig

from relloc.runs.launch import launch


def run(config: DictConfig) -> None:
    """Pretrain and evaluate what `config` says."""
    from relloc.runs import build, invocation, pretraining  # torch loads here: --help does without

    pretraining.pretrain(build.pretraining(config), invocation.Invocation.of(config))


if __name__ == "__main__":
    launch(run, "train")
