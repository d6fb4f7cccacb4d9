"""Answers prompts with vLLM. This is a program of its own, which runs in any Python that has vllm; profuser need not be there.

It reads JSON lines from its standard input and writes such lines to its standard output; whatever vLLM prints goes to the standard
error. The first line that it reads has the `engine` arguments. It then writes {"ready": ...}. Every further line is a request: `id`,
`prompt` (token ids) and `sampling` (of SamplingParams). When a request is answered, it writes {"id", "tokens", "reason"}. If anything
fails it writes {"error": ...}. It ends when its input ends, which is so when its parent has ended.
"""

import json
import os
import queue
import sys
import threading

HERE = os.path.dirname(os.path.abspath(__file__))


def read(lines, requests):
    """Puts every request into a queue. At the end of the input nobody waits for an answer any more."""
    for line in lines:
        requests.put(json.loads(line))
    os._exit(0)


def serve(lines, say):
    """Starts the engine and answers requests for ever."""
    import vllm

    engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**json.loads(lines.readline())["engine"]))
    say({"ready": getattr(vllm, "__version__", "")})
    requests = queue.SimpleQueue()
    threading.Thread(target=read, args=(lines, requests), daemon=True).start()
    while True:
        # Take all requests that wait. Where there is nothing to do, wait for one.
        while not engine.has_unfinished_requests() or not requests.empty():
            request = requests.get()
            sampling = vllm.SamplingParams(**request["sampling"])
            engine.add_request(request["id"], {"prompt_token_ids": request["prompt"]}, sampling)
        for output in engine.step():
            if output.finished:
                (found,) = output.outputs
                tokens = [int(token) for token in found.token_ids]
                say({"id": output.request_id, "tokens": tokens, "reason": found.finish_reason})


def main():
    # The folder of this file must not come before vLLM's own modules, and what vLLM prints must not come between the answers.
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != HERE]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message):
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        serve(sys.stdin, say)
    except BaseException as error:
        import traceback

        traceback.print_exc()
        text = " ".join(str(error).split())
        say({"error": f"{type(error).__name__}: {text}"[:600]})
        os._exit(1)


if __name__ == "__main__":
    main()
