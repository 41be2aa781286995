from relloc.evaluation.schedule import in_words


def test_words_name_the_milestones_that_are_reached() -> None:
    assert in_words(90, [30, 60, 90], 0.1) == "90 epochs, x0.1 at 30, 60"
    assert in_words(1, [30, 60], 0.1) == "1 epochs"
