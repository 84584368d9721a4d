"""Decode with passes, and see what each forward did: python examples/decode.py"""

import dmoe_compile

model, tokenizer = dmoe_compile.load_demo_model()
question = "Mia has 7 pens. Mia buys 5 more. Mia gives away 3. How many pens does Mia have? Solution:"
prompt = tokenizer(question, return_tensors="pt")["input_ids"]

for passes in ((), ("cover",), ("team", "cover")):
    config = dmoe_compile.Config.from_options({"passes": passes, "cover.mass": 0.8, "stats": True})
    steps = []
    result = dmoe_compile.generate(model, prompt, config=config, max_new_tokens=32, trace=steps.append)
    (answer,) = tokenizer.batch_decode(result.answers, skip_special_tokens=True)
    print(f"{'+'.join(passes) or 'no pass'}: {answer}  ({result.unique_experts:.1f} experts a layer and forward)")
    for step in steps:
        if step["kind"] == "forward" and "sequences" in step:
            print(f"  {step['forward']}: committed {tokenizer.decode(step['sequences'][0]['tokens'])!r}")
