"""Selects slow tests by their fixtures, and the test files that run first."""

# Fixtures whose first setup takes seconds to minutes. A test that uses one, directly or not, is slow.
SLOW = {"aoti_bundle", "native_build", "shared_build", "bundle", "causal_bundle", "made", "amax", "trained_teacher",
        "student_file", "assembled"}  # fmt: skip
# The slowest files, slowest first, so that the processes of a run end at about the same time. The first two compile
# different artefacts. Later files reuse them.
FIRST = (
    "test_aoti.py", "test_csrc.py", "test_wheel.py", "test_export.py", "test_ray.py", "test_page_browser.py",
    "test_compile.py",
    "test_distill_training.py", "test_export_fp8.py", "test_rtx_plans.py", "test_tensorrt.py",
    "test_engine_launches.py", "test_bench_commands.py", "test_distill_tools.py", "test_run_cli.py",
    "test_native.py", "test_csrc_tokenizer.py", "test_parity.py", "test_bench_backends.py", "test_embedded.py",
    "test_scaling.py", "test_checkpoint.py", "test_failures.py", "test_causal.py", "test_chaos.py",
    "test_bench_serve.py", "test_jobs_http.py",
)  # fmt: skip
