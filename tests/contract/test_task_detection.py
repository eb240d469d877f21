"""The task of free text: a table of phrasings with the task and the text each must give."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.contract.prompt import TASKS, render
from runtime.contract.task_detection import detect_task

CAPTION = {
    "describe": "describe",
    "Describe the image.": "Describe the image.",
    "describe   the\n image": "describe the image",
    "please describe this picture": "describe this picture",
    "can you describe the image?": "describe the image",
    "Could you please describe the photo?": "describe the photo",
    "caption": "caption",
    "caption this image": "caption this image",
    "summarize the scene": "summarize the scene",
    "Summarise the picture!": "Summarise the picture!",
    "write a short caption": "write a short caption",
    "Give me a description of the photo": "Give me a description of the photo",
    "what is in the image?": "what is in the image?",
    "what's in this picture": "what's in this picture?",
    "What do you see?": "What do you see?",
    "What can you see in the photo?": "What can you see in the photo?",
    "tell me what you see": "what you see?",
    "what does the image show?": "what does the image show?",
}
GROUND = {
    "where is the red circle?": "red circle",
    "Where's the red circle": "red circle",
    "where  is\tthe   red circle ?": "red circle",
    "WHERE ARE THE CIRCLES?": "CIRCLES",
    "where is the small blue square in the image?": "small blue square",
    "Find the small blue square.": "small blue square",
    "find a red circle": "red circle",
    "find me the red circle": "red circle",
    "find the number 7": "number 7",
    "find the name tag": "name tag",
    "please find the red circle": "red circle",
    "can you find the red circle?": "red circle",
    "Could you locate the star for me?": "star for me",
    "locate the star": "star",
    "point to the cross": "cross",
    "Point at the large triangle!": "large triangle",
    "ground the man with the outdoor hat": "man with the outdoor hat",
    "detect the dog": "dog",
    "highlight the dog": "dog",
    "show me the red circle": "red circle",
    "show me where the red circle is": "red circle",
    "tell me where the red circle is.": "red circle",
    "do you know where the cat is?": "cat",
    "where can I find the exit?": "exit",
    "draw a box around the red circle": "red circle",
    "give me the bounding box of the car": "car",
    "what are the coordinates of the red circle?": "red circle",
}
VQA = {
    "how many circles are there?": "how many circles are there?",
    "how many objects are there": "how many objects are there?",
    "How many objects are there.": "How many objects are there?",
    "find out how many objects are there": "how many objects are there?",
    "find out how many circles there are": "how many circles there are?",
    "find out whether there is a star": "whether there is a star",
    "tell me how many circles there are": "how many circles there are?",
    "can you tell me what color is the circle?": "what color is the circle?",
    "I want to know what shape is the red object": "what shape is the red object?",
    "find the number of circles": "find the number of circles",
    "the color of the circle": "the color of the circle",
    "count the circles": "count the circles",
    "can you count the circles?": "count the circles",
    "can you see a dog?": "can you see a dog?",
    "is there a star": "is there a star?",
    "is  there  a   star ?": "is there a star?",
    "are there any people": "are there any people?",
    "Is the red circle left of the square?": "Is the red circle left of the square?",
    "does the man wear a hat?": "does the man wear a hat?",
    "What colour is it?": "What colour is it?",
    "what time is it": "what time is it?",
    "what's the man holding?": "what's the man holding?",
    "which object is red": "which object is red?",
    "who is in the photo?": "who is in the photo?",
    "whose car is this?": "whose car is this?",
    "was it raining?": "was it raining?",
    "what is it?": "what is it?",
    "where is this?": "where is this?",
    "where was this photo taken?": "where was this photo taken?",
    "where is the man going?": "where is the man going?",
    "where is the circle relative to the square?": "where is the circle relative to the square?",
    "in the picture, how many dogs are there?": "in the picture, how many dogs are there?",
    "do you know how old the man is?": "how old the man is?",
}
CHAT = (
    "Tell me a story about it",
    "Write a poem about the picture.",
    "Can you write a poem about it?",
    "Could you explain the joke?",
    "point out the mistakes",
    "find the difference between the two shapes",
    "find a way to improve this photo",
    "find a title for this",
    "What a lovely picture",
    "How to draw such a circle",
    "Hello.",
    "when you look at it, be brief",
    "do a translation of the sign",
    "What is happening here? Explain it in detail.",
    "how does this machine work, explain it step by step",
    "The circle is red",
    "whatever you like",
    "the whole story",
    "if there is a dog, say its name",
    "compare\nthe two   shapes",
)
TABLE = [
    *((text, "caption", rest) for text, rest in CAPTION.items()),
    *((text, "ground", rest) for text, rest in GROUND.items()),
    *((text, "vqa", rest) for text, rest in VQA.items()),
    *((text, "chat", text) for text in CHAT),
]


def test_the_table_is_large() -> None:
    assert len(TABLE) >= 90 and {task for _, task, _ in TABLE} == set(TASKS)


@pytest.mark.parametrize(("text", "task", "rest"), TABLE, ids=[row[0] for row in TABLE])
def test_the_task_of_a_phrasing(text: str, task: str, rest: str) -> None:
    assert detect_task(text) == (task, rest)


@pytest.mark.parametrize("text", [*CAPTION, *GROUND, *VQA])
def test_white_space_changes_nothing(text: str) -> None:
    def rendered(given: str) -> tuple[str, object]:
        task, rest = detect_task(given)
        return task, render(task, rest)

    assert rendered(f"\n {text.replace(' ', '  ')}\t") == rendered(text)


@pytest.mark.parametrize(
    "text",
    [
        "?" * 200_000,
        "where is " + "? " * 100_000 + "x",
        "please " * 50_000,
        "find " * 50_000,
        "if " + "is " * 50_000 + ",",
        "where the " + "is " * 50_000 + "x",
        "in the image " * 20_000,
    ],
    ids=range(7),
)
def test_long_text_is_read_at_once(text: str) -> None:
    assert detect_task(text)[0] in TASKS  # a search in quadratic time would take minutes


@given(st.text(max_size=60))
def test_any_text_has_a_task(text: str) -> None:
    assert detect_task(text)[0] in TASKS
