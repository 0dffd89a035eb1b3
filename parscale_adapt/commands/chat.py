"""`parscale chat`: talk to a model in the terminal, and switch its streams while the conversation goes on."""

from typing import TYPE_CHECKING, Annotated

import typer

from .output import hide_progress_bars, print_table


if TYPE_CHECKING:
    from ..serving.conversation import Conversation

HELP = """\
/p N       the adapter with N streams; /p 1 is the plain backbone
/use NAME  the adapter of that name
/off       the plain backbone
/adapters  what can answer
/reset     forget the conversation
/quit      leave (also Ctrl-D)
Anything else is said to the model; a switch keeps the conversation."""


def chat(
    path: Annotated[
        str, typer.Argument(help="Backbone, export, published checkpoint or adapter: folder or hub name.")
    ],
    backbone: Annotated[
        str | None, typer.Option(help="Backbone of an adapter (default: the one that its config names).")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH or PATH of an adapter to load as well; can be given again.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.", min=1)] = 512,
    temperature: Annotated[float, typer.Option(help="0: the most likely token each time.", min=0)] = 0.0,
) -> None:
    """Chat with a model; several adapters share one backbone in memory, and `/p 4` switches to the one with 4 streams.

    A standalone export brings its code, which parscale_adapt wrote there; this command runs it, so chat only with
    folders whose origin you trust.
    """
    hide_progress_bars()
    from ..serving.conversation import Conversation
    from ..serving.loading import find_speaker, load_speaker

    model, tokenizer, voices = load_speaker(find_speaker(path, backbone, adapter or ()))
    conversation = Conversation(model, tokenizer, voices, max_new_tokens, temperature)
    if tokenizer.chat_template is None:
        print("The tokenizer has no chat template: the model goes on with your text as it stands.")
    print("/help shows the commands.")
    while _take_turn(conversation):
        pass


def _take_turn(conversation: "Conversation") -> bool:
    """Read a line and do what it says; False at the end."""
    try:
        line = input(f"{_describe(conversation)}> ").strip()
    except EOFError:
        print()
        return False
    if line == "/quit":
        return False
    try:
        if line.startswith("/"):
            follow(conversation, line)
        elif line:
            conversation.say(line)
    except ValueError as error:
        print(error)
    return True


def _describe(conversation: "Conversation") -> str:
    return f"{conversation.voice.name}, P = {conversation.voice.num_streams}"


def follow(conversation: "Conversation", line: str) -> None:
    """Do what a line that begins with a slash says.

    Raises:
        ValueError: there is no such command, or it can't be followed; nothing is changed.
    """
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command == "/help":
        print(HELP)
    elif command == "/adapters":
        rows = [[voice.name, str(voice.num_streams)] for voice in conversation.voices]
        print_table("What can answer", ["name", "P"], rows)
    elif command == "/reset":
        conversation.reset()
        print("The conversation starts anew.")
    elif command in ("/p", "/use", "/off"):
        if command == "/p" and not argument.isdecimal():
            raise ValueError(f"/p needs a number of streams, such as /p 4, got {argument!r}.")
        if command == "/p":
            conversation.use(conversation.with_streams(int(argument)))
        else:
            conversation.use(conversation.named(argument) if command == "/use" else conversation.plain)
        print(f"Now: {_describe(conversation)}.")
    else:
        raise ValueError(f"There is no command {command}: /help shows them all.")
