"""python -m relloc.evaluate: any backbone through any evaluations."""

from omegaconf import DictConfig

from relloc.runs.launch import launch


def run(config: DictConfig) -> None:
    """Evaluate the checkpoint that `config` names."""
    from relloc.runs.evaluating import evaluate_checkpoint  # torch loads here: --help does without

    evaluate_checkpoint(config)


if __name__ == "__main__":
    launch(run, "evaluate")
