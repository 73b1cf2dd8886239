"""What of ours runs inside vLLM's processes when the student samples there: the draw of every token, the hand-over of
weights. Needs vLLM 0.32 and its V1 model runner; each module imports vllm only inside what vLLM calls.
"""
