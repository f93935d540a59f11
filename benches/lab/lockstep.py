"""A client and its backends in one process: one stream, whose next event is sent when the last one has come.

So each event wakes a proxy once, is read once and written once, whatever the machine does meanwhile. Under load events
fall together, and their cost scatters by more than a gate can bear.
"""
import json, queue, socket, threading

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
REQUEST = json.dumps({"model": "m", "stream": True, "temperature": 0, "messages": [{"role": "user", "content": "Say it."}]}).encode()
WORDS = "the quick brown fox jumps over a lazy dog and then some more".split()
SECONDS = 20


def event(i):
    """The i-th event: of ordinary size, and never the same text twice in a row."""
    word = f" {WORDS[i % len(WORDS)]}"
    chunk = {"id": "chatcmpl-7f3a", "object": "chat.completion.chunk", "created": 1700000000, "model": "m",
             "choices": [{"index": 0, "delta": {"content": word}, "logprobs": None, "finish_reason": None}]}
    return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n".encode()


class Backends:
    """Answers probes, and streams what `said` has."""
    def __init__(self, ports):
        self.said = queue.Queue()
        self.listeners = [socket.create_server(("127.0.0.1", port)) for port in ports]
        for listener in self.listeners: threading.Thread(target=self.accept, args=(listener,), daemon=True).start()

    def accept(self, listener):
        while True:
            try: connection, _ = listener.accept()
            except OSError: return
            threading.Thread(target=self.serve_until_gone, args=(connection,), daemon=True).start()

    def serve_until_gone(self, connection):
        try: self.serve(connection)
        except ConnectionError: pass # the proxy has ended

    def serve(self, connection):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        read = connection.makefile("rb")
        with connection:
            while (line := read.readline()):
                length = 0
                while (field := read.readline()) not in (b"\r\n", b""):
                    name, _, value = field.partition(b":")
                    if name.lower() == b"content-length": length = int(value)
                read.read(length)
                if not line.startswith(b"POST"):
                    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
                    continue
                connection.sendall(HEAD)
                while (said := self.said.get()) is not None: connection.sendall(b"%x\r\n%s\r\n" % (len(said), said))
                return

    def stop(self):
        for listener in self.listeners: listener.close()


def stream(port, backends, events):
    """Streams so many events through the proxy at `port`; each must come out as it went in."""
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: lab\r\ncontent-type: application/json\r\n"
                       b"content-length: %d\r\n\r\n%s" % (len(REQUEST), REQUEST))
        came = b""
        for i in range(events):
            said = event(i); backends.said.put(said)
            while not (end := came.find(said) + len(said)) >= len(said):
                more = client.recv(1 << 16)
                if not more: raise SystemExit(f"the stream ended behind {i} events: {came!r}")
                came += more
            came = came[end:]
        backends.said.put(None)
    return events
