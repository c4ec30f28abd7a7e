"""A child for supervisors: says hello, answers HTTP, and misbehaves as told."""

import argparse
import http.server
import os
import signal
import sys

parser = argparse.ArgumentParser()
parser.add_argument("port", type=int)
parser.add_argument("--fail", help="print this and exit with status 3")
parser.add_argument("--stubborn", action="store_true", help="ignore SIGTERM")
options = parser.parse_args()

print(f"hello from {os.getpid()}", flush=True)
if options.fail:
    print(options.fail, file=sys.stderr)
    sys.exit(3)
if options.stubborn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


http.server.HTTPServer(("127.0.0.1", options.port), Healthy).serve_forever()
