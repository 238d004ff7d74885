"""Generated from open_inference.proto; make them again with: python benchmarks/generate_oip.py"""
