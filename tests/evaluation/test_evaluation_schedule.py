from relloc.evaluation.schedule import describe_schedule


def test_words_name_the_milestones_that_are_reached() -> None:
    assert describe_schedule(90, [30, 60, 90], 0.1) == "90 epochs, x0.1 at 30, 60"
    assert describe_schedule(1, [30, 60], 0.1) == "1 epoch"
