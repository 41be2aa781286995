from relloc.transfer.metrics.per_image import PerImage


def test_values_come_in_the_order_of_images() -> None:
    images: PerImage[str] = PerImage()
    for image, value in ((7, "late"), (2, "early"), (5, "middle")):
        images.add(image, value)
    assert images.evaluate(list) == ["early", "middle", "late"]


def test_an_image_counts_once() -> None:
    images: PerImage[int] = PerImage()
    for image in (0, 1, 0):
        images.add(image, 1)
    assert images.evaluate(sum) == 2


def test_no_image_is_no_value() -> None:
    assert PerImage().evaluate(len) == 0
