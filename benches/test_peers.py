#!/usr/bin/env python3
"""Tests of peers.py with programs that only pretend: what is read from them, and what happens when they fail."""

import contextlib
import io
import json
import os
import stat
import sys
import tempfile
import time
import unittest

sys.dont_write_bytecode = True
import peers

HEALTHY = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def is_running(process_id):
    try:
        os.kill(process_id, 0)
        return True
    except ProcessLookupError:
        return False


class PeersTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.log = os.path.join(self.folder, "log")
        quiet = contextlib.redirect_stderr(io.StringIO())
        self.said = quiet.__enter__()
        self.addCleanup(quiet.__exit__, None, None, None)

    def program(self, name, text):
        """A Python program; it keeps the arguments of its last run."""
        path = os.path.join(self.folder, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"#!{sys.executable}\nimport sys, time\n")
            file.write(f"open({path!r} + '.arguments', 'w').write('\\n'.join(sys.argv[1:]))\n{text}\n")
        os.chmod(path, os.stat(path).st_mode | stat.S_IXUSR)
        return path

    def arguments_of(self, name):
        with open(os.path.join(self.folder, f"{name}.arguments"), encoding="utf-8") as file:
            return file.read().split("\n")

    def sides(self, *flags):
        options = peers.arguments(["--tandem", os.path.join(self.folder, "tandem"), "--threads", "3", *flags])
        return peers.Sides(options, self.folder, "model.gguf")

    def row(self, name):
        return next(row for row in peers.ROWS if row.name == name)

    def test_a_table_holds_medians_shares_and_ratios(self):
        limits = {"read_gb_per_s": 50.0, "int8_tops": 1.5, "bf16_tflops": 0.7}
        tandem = [{"tokens_per_second": rate, "share_of_limit": 0.3, "limits": limits} for rate in (100, 3000, 2000)]
        peer = [{"tokens_per_second": rate} for rate in (400, 500, 100)]
        decode = {"title": "prefill 512", "kind": "prefill", "runs": {"tandem": tandem, "peer": peer}}
        serving = [{"tokens_per_second": 10.0, "ttft_ms": 20.0, "tpot_ms": 2.0}]
        waiting = [{"tokens_per_second": 5.0, "ttft_ms": 50.0, "tpot_ms": 4.0}]
        serve = {"title": "server", "kind": "serve", "runs": {"tandem": serving, "peer": waiting}}
        report = {
            "models": [{"file": "m.gguf", "results": [decode, serve]}], "isa": "native", "threads": 2, "repeat": 3,
            "quick": False, "tandem_flags": "", "cpu": "cpu", "peer": peers.PEER,
        }
        table = peers.markdown(report)
        self.assertIn("| prefill 512, tok/s | 2,000 | 30 % | 400 | 5.00 × |", table)
        self.assertIn("| server, output tok/s | 10.0 | – | 5.00 | 2.00 × |", table)
        self.assertIn("| server, median TTFT, ms | 20.0 | – | 50.0 | 2.50 × |", table)
        self.assertIn("read 50–50 GB/s, int8 1.50–1.50 TOP/s", table)
        self.assertNotIn("quoted", table)

    def test_the_peers_programs_are_asked_for_the_same_work(self):
        self.program("llama-bench", "print('[{\"avg_ts\": 12.5}]')")
        sides = self.sides()
        self.assertEqual(sides.peer(self.row("decode4096"), 0), {"tokens_per_second": 12.5})
        asked = " ".join(self.arguments_of("llama-bench"))
        self.assertIn("-t 3 -r 1 -o json -p 0 -n 64 -d 4096", asked)
        sides.peer(self.row("prefill512"), 0)
        self.assertIn("-p 512 -n 0", " ".join(self.arguments_of("llama-bench")))
        self.program("llama-batched-bench", "print('a log line')\nprint('0.1 I {\"speed_tg\": 99.5, \"pl\": 16}')")
        self.assertEqual(sides.peer(self.row("decode16"), 0), {"tokens_per_second": 99.5})
        self.assertIn("-c 3072 -b 2048 -ub 512 -npp 128 -ntg 64 -npl 16", " ".join(self.arguments_of("llama-batched-bench")))

    def test_tandem_gets_the_rows_sizes_and_the_instruction_set(self):
        result = {"decode_tokens_per_second": 7.0, "decode_share_of_limit": 0.5}
        report = {"results": [result], "limits": {}, "isa": "avx2", "activations": "bf16"}
        self.program("tandem", f"print({json.dumps(report)!r})")
        measured = self.sides("--isa", "avx2", "--tandem-flags", "--activations bf16").tandem(self.row("decode16"), 0)
        self.assertEqual((measured["tokens_per_second"], measured["share_of_limit"]), (7.0, 0.5))
        asked = " ".join(self.arguments_of("tandem"))
        for words in ("--threads 3", "--isa avx2", "--activations bf16", "--prompt-tokens 128 --output-tokens 64",
                      "--requests 16 --concurrency 16"):
            self.assertIn(words, asked)

    def test_a_share_above_one_is_a_warning_and_other_failures_are_not(self):
        report = {"results": [{"prefill_tokens_per_second": 7.0, "prefill_share_of_limit": 1.2}], "limits": {},
                  "isa": "avx512", "activations": "int8"}
        failing = f"print({json.dumps(report)!r})\nprint('tandem: SAID', file=sys.stderr)\nsys.exit(1)"
        self.program("tandem", failing.replace("SAID", "prefill reached 1.20 of a limit"))
        self.assertIn("of a limit", self.sides().tandem(self.row("prefill512"), 0)["warning"])
        self.program("tandem", failing.replace("SAID", "3 of 8 requests failed"))
        with self.assertRaisesRegex(peers.Problem, "3 of 8 requests failed"):
            self.sides().tandem(self.row("prefill512"), 0)

    def test_prompts_that_a_cache_knew_are_no_measurement(self):
        result = {"num_requests": 4, "total_prompt_tokens": 512, "total_cached_tokens": 127,
                  "output_tokens_per_second": 1.0, "ttft_ms": {"p50": 1.0}, "tpot_ms": {"p50": 1.0}}
        self.program("tandem", f"print({json.dumps({'results': [result]})!r})")
        server = peers.Server("server", [], self.log)
        with self.assertRaisesRegex(peers.Problem, "other prompts"):
            self.sides().serve(server, self.row("serve1"), 0)
        self.program("tandem", f"print({json.dumps({'results': [result | {'total_cached_tokens': 0}]})!r})")
        seeds = []
        for name, number in (("serve1", 0), ("serve1", 1), ("serve16", 0)):
            self.assertEqual(self.sides().serve(server, self.row(name), number)["tokens_per_second"], 1.0)
            asked = self.arguments_of("tandem")
            seeds.append(asked[asked.index("--seed") + 1])
        self.assertEqual(len(set(seeds)), 3, "no two measurements of a server share prompts")

    def test_a_program_that_fails_hangs_or_says_nothing_is_named(self):
        self.program("llama-bench", "print('no such file', file=sys.stderr)\nsys.exit(3)")
        with self.assertRaisesRegex(peers.Problem, "llama-bench failed with 3(.|\n)*no such file"):
            self.sides().peer(self.row("decode1"), 0)
        self.program("llama-bench", "time.sleep(60)")
        started = time.monotonic()
        with self.assertRaisesRegex(peers.Problem, "was not done after 1 s"):
            self.sides("--timeout", "1").peer(self.row("decode1"), 0)
        self.assertLess(time.monotonic() - started, 30)
        self.program("llama-bench", "")
        with self.assertRaisesRegex(peers.Problem, "no result"):
            self.sides().peer(self.row("decode1"), 0)
        os.remove(os.path.join(self.folder, "llama-bench"))
        with self.assertRaisesRegex(peers.Problem, "does not start"):
            self.sides().peer(self.row("decode1"), 0)

    def test_a_server_lives_as_long_as_its_block(self):
        server = peers.Server("server", [self.program("server", HEALTHY), "{port}"], self.log)
        with self.assertRaises(ZeroDivisionError), server:
            self.assertTrue(is_running(server.process.pid))
            1 / 0
        self.assertIsNotNone(server.process.returncode)
        self.assertFalse(is_running(server.process.pid))

    def test_a_server_that_does_not_get_ready_is_stopped(self):
        server = peers.Server("server", [self.program("server", "sys.exit(7)"), "{port}"], self.log)
        with self.assertRaisesRegex(peers.Problem, "ended with 7"), server:
            self.fail("it never was ready")
        patience, peers.READY_TIMEOUT_S = peers.READY_TIMEOUT_S, 1
        self.addCleanup(setattr, peers, "READY_TIMEOUT_S", patience)
        server = peers.Server("server", [self.program("server", "time.sleep(60)"), "{port}"], self.log)
        with self.assertRaisesRegex(peers.Problem, "was not ready after 1 s"), server:
            self.fail("it never was ready")
        self.assertFalse(is_running(server.process.pid))

    def test_bad_arguments_are_refused_by_name(self):
        for bad in (["--rows", "decode2"], ["--models", "q5"], ["--repeat", "0"], ["--isa", "neon"], ["fly"]):
            with self.assertRaises(SystemExit):
                peers.arguments(bad)
            self.assertIn(bad[-1], self.said.getvalue())
        quick = peers.arguments(["--quick"])
        self.assertEqual((quick.repeat, quick.models), (1, ["q4_1"]))
        every = peers.arguments([])
        self.assertEqual((every.repeat, len(every.models), len(every.rows)), (5, 4, 7))
        with self.assertRaisesRegex(SystemExit, "is not there"):
            peers.main(["--tandem", "/nowhere/tandem"])


if __name__ == "__main__":
    unittest.main()
