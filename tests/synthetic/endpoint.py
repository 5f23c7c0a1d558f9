"""A stand-in for an OpenAI-compatible endpoint, which knows the passages of the demo's corpus."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from kdfast.demo.passages import passages

KEY = "sk-stand-in-0123456789"
PASSAGES = passages("validation", 60, 0)[0]


def write_contexts(path, count=12):
    """JSONL of the first passages, four to an article."""
    lines = [
        json.dumps({"title": f"article {number // 4}", "context": passage.text})
        for number, passage in enumerate(PASSAGES[:count])
    ]
    path.write_text("\n".join(lines))
    return str(path)


def lines_of(passage):
    """What a good generator replies."""
    asked = [{"question": q.text, "answer": q.answer} for q in passage.questions if q.answer]
    return "\n".join(map(json.dumps, asked))


def completion(text, finish="stop", **message):
    """The body of a reply."""
    said = {"role": "assistant", "content": text, **message}
    choice = {"index": 0, "message": said, "finish_reason": finish}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m-1",
        "choices": [choice],
    }


class StandIn:
    """asked: the requests. answer: of a passage and the request's number, a body, a status with a
    body, or bytes; replaced by tests."""

    def __init__(self):
        self.asked = []
        self.keys = set()
        self.lock = threading.Lock()
        self.answer = lambda passage, number: completion(lines_of(passage))


@contextmanager
def serve():
    """(address, StandIn) of one that runs."""
    stand_in = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            """Nothing is printed."""

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with stand_in.lock:
                number = len(stand_in.asked)
                stand_in.asked.append(request)
                stand_in.keys.add(self.headers["Authorization"])
            prompt = request["messages"][0]["content"]
            passage = next(each for each in PASSAGES if each.text in prompt)
            found = stand_in.answer(passage, number)
            status, body = found if isinstance(found, tuple) else (200, found)
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", stand_in
        server.shutdown()
