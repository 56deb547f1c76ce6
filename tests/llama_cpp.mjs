// llama.cpp behind a pipe: one JSON object a line in, one a line out; on one thread.
//
//   node llama_cpp.mjs DIRECTORY     DIRECTORY holds llama.cpp's library and its add-on for Node
//
// What is asked and answered is described in llama_cpp.py.
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { join } from "node:path";

const THREADS = 1, CONTEXT = 256, WARNINGS = 3; // several threads wait for each other where a machine is busy
const directory = process.argv[2];
const llama = createRequire(import.meta.url)(join(directory, "llama-addon.node"));
let log = [];
llama.setLogger((_level, message) => log.push(message));
llama.setLoggerLogLevel(WARNINGS);
llama.loadBackends(directory);
await llama.init();

async function continued(model, prompt, steps) {
    const context = new llama.AddonContext(model, {
        contextSize: CONTEXT, batchSize: CONTEXT, sequences: 1, threads: THREADS, flashAttention: false,
    });
    if (!(await context.init())) throw new Error("no context");
    const sampler = new llama.AddonSampler(model);
    sampler.applyConfig({ temperature: 0 });
    const ids = [], probabilities = [];
    for (let given = prompt, position = 0; ids.length < steps; position += given.length, given = ids.slice(-1)) {
        context.initBatch(given.length);
        const [last] = context.addToBatch(0, position, Uint32Array.from(given), Uint32Array.of(given.length - 1));
        await context.decodeBatch();
        const [token, pairs] = await context.sampleToken(last, sampler, true);
        if (!ids.length) for (let i = 0; i < pairs.length; i += 2) probabilities[pairs[i]] = pairs[i + 1];
        ids.push(token);
    }
    sampler.dispose();
    await context.dispose();
    return { ids, probabilities };
}

async function answer({ file, texts, marked, prompts, steps, ids }) {
    const model = new llama.AddonModel(file, { gpuLayers: 0, useMmap: true, vocabOnly: !prompts.length });
    if (!(await model.init())) throw new Error("not loaded");
    const answers = [];
    for (const prompt of prompts) answers.push(await continued(model, prompt, steps));
    const found = {
        texts: texts.map((text) => Array.from(model.tokenize(text, false))),
        marked: marked.map((text) => Array.from(model.tokenize(text, true))),
        answers,
        opening: model.shouldPrependBosToken() ? [model.tokenBos()] : [],
        ends: ids.filter((id) => model.isEogToken(id)),
        words: ids.map((id) => model.detokenize(Uint32Array.of(id), false)),
    };
    await model.dispose();
    return found;
}

for await (const line of createInterface({ input: process.stdin })) {
    log = [];
    const said = await answer(JSON.parse(line)).catch(async (error) => {
        await new Promise((resolve) => setTimeout(resolve, 20)); // the log comes by way of the event loop
        return { error: `${error.message}\n${log.join("")}` };
    });
    console.log(JSON.stringify(said));
}
