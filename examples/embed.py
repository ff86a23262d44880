"""The engine inside a threaded application: one model, a worker that owns it, callers that wait for their turn.

    python examples/embed.py

A model serves one caller at a time (a second one gets BusyError); a queue turns that into waiting.
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future

import engine


class Assistant:
    """Answers questions from any thread."""

    def __init__(self, name: str = "nemotron-tiny") -> None:
        self._model = engine.load(name, context=1024)
        self._jobs: queue.Queue[tuple[str, Future[str]] | None] = queue.Queue(maxsize=64)
        self._worker = threading.Thread(target=self._run, name="assistant", daemon=True)
        self._worker.start()

    def ask(self, question: str) -> Future[str]:
        """The answer, later. Raises queue.Full when 64 questions wait already."""
        answer: Future[str] = Future()
        self._jobs.put_nowait((question, answer))
        return answer

    def close(self) -> None:
        """Finishes what is queued."""
        self._jobs.put(None)
        self._worker.join()
        self._model.close()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            question, answer = job
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                result = self._model.chat([{"role": "user", "content": question}], max_new_tokens=200)
                answer.set_result(result.message.content)
            except Exception as error:  # the caller's to handle
                answer.set_exception(error)


def main() -> None:
    assistant = Assistant()
    questions = [f"What is {a} + {b}?" for a, b in ((12, 30), (47, 85), (123, 456))]
    answers: dict[str, str] = {}

    def caller(question: str) -> None:
        answers[question] = assistant.ask(question).result(timeout=60)

    threads = [threading.Thread(target=caller, args=(q,)) for q in questions]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assistant.close()
    for question in questions:
        print(f"{question}  {answers[question]}")


if __name__ == "__main__":
    main()
