"""Errors of the preparation tools."""


class PrepareError(Exception):
    """A mistake or a lack that the user can fix.

    The message says what is wrong, where, and what to do about it; the tool prints it alone on
    standard error and ends with exit code 2.
    """


class ChatError(Exception):
    """One conversation cannot be used. The caller, which knows its file and line, raises a PrepareError from it."""


def rewritten_answer(turn: int, when: str = "when other turns follow") -> ChatError:
    """The template writes another text for an answer (`turn` from 0) than the model does."""
    return ChatError(
        f"the chat template changes the assistant's message {turn + 1} otherwise than by trimming it {when} (some cut "
        "the reasoning out of earlier answers), so what the model writes there is not in the text. Train it in a row of "
        "its own (--rewritten split), leave it out (--rewritten mask), or give the content as the template renders it"
    )


def left_out(turn: int, what: str) -> ChatError:
    """The template does not write what an answer holds."""
    return ChatError(
        f"the chat template leaves {what} of the assistant's message {turn + 1} out, so it would not be learned. Use a "
        "model folder whose chat template knows it, or take it out of the message"
    )


def without_reasoning(turn: int, tag: str) -> ChatError:
    """An answer without reasoning under a template whose generation prompt opens some."""
    return ChatError(
        f"the chat template's generation prompt opens reasoning (<{tag}>), but the assistant's message {turn + 1} has none, "
        "so it is not what the model writes there. Give the message reasoning_content, or reasoning from "
        f"<{tag}> to </{tag}> in its content; or train it as the template shows it, without --rewritten split"
    )
