"""Text in and out of a language model: tokenizer, chat template, reply parsing."""

from engine.io.text.parse import Event, Message, ResponseStream, StopScanner, Tags, ToolCall, parse_response
from engine.io.text.template import ChatTemplate
from engine.io.text.tokenizer import StreamDecoder, Tokenizer
from engine.io.text.tools import tool_from_function

__all__ = [
    "ChatTemplate",
    "Event",
    "Message",
    "ResponseStream",
    "StopScanner",
    "StreamDecoder",
    "Tags",
    "Tokenizer",
    "ToolCall",
    "parse_response",
    "tool_from_function",
]
