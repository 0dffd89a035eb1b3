"""Problems in EvalPlus's format, and a script that stands for the Python of an environment with EvalPlus."""

import sys


PROBLEMS = [
    {"task_id": f"HumanEval/{number}", "prompt": f"def f{number}(x):\n", "entry_point": f"f{number}"}
    for number in range(3)
]
TESTS = {"base_input": [[1]], "plus_input": [[2]], "canonical_solution": "    return x\n", "contract": "", "atol": 0}
# Stands for the Python of an environment with EvalPlus: every second program passes, and the second problem's fail "plus".
STAND_IN = f"""#!{sys.executable}
import json, os, sys
words = sys.argv[1:]
if words[0] == "-c":
    print("0.0.test")
elif words[1] == "evalplus.sanitize":
    lines = open("samples.jsonl").read()
    open("samples-sanitized.jsonl", "w").write(lines)
elif words[1:] == ["evalplus.evaluate", "humaneval", "--samples", "samples-sanitized.jsonl"]:
    found = {{}}
    for number, line in enumerate(open("samples-sanitized.jsonl")):
        one = json.loads(line)
        base = "pass" if number % 2 == 0 else "fail"
        plus = "fail" if one["task_id"].endswith("1") else base
        found.setdefault(one["task_id"], []).append({{"base_status": base, "plus_status": plus}})
    json.dump({{"eval": found}}, open("samples-sanitized_eval_results.json", "w"))
    problems = [json.loads(line) for line in open(os.environ["HUMANEVAL_OVERRIDE_PATH"])]
    seen = {{"variables": sorted(os.environ), "home": os.environ["HOME"], "problems": len(problems)}}
    json.dump(seen, open(SEEN, "w"))
else:
    sys.exit(f"unknown {{words}}")
"""
