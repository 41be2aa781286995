"""Questions to a person about patches that are easy to tell apart."""

import torch

from relloc.studies.human.questions import Question


def made_questions(n: int, patch_px: int = 16) -> list[Question]:
    """Questions whose patches are noise; the label of question i is 3 i modulo 8."""
    questions = []
    for number in range(n):
        generator = torch.Generator().manual_seed(number)
        shape = (9, 3, patch_px, patch_px)
        patches = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        question = Question(
            number=number,
            label=3 * number % 8,
            source=f"{number // 2}.jpg",
            patches=patches,
            shown=patches,
        )
        questions.append(question)
    return questions
