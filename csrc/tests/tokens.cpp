// tokens FOLDER reads prompts from stdin, one JSON string per line. It writes the number of unpadded ids and all ids.
#include <cstdio>
#include <iostream>

#include "base/error.h"
#include "base/file.h"
#include "formats/json.h"
#include "text/cleaning.h"
#include "text/tokenizer.h"

int main(int argc, char** argv) {
    using namespace greedy::core;
    if (argc != 2) return std::fprintf(stderr, "usage: tokens FOLDER\n"), 2;
    try {
        const std::string folder = argv[1];
        const FileBytes model(folder + "/tokenizer.json"), config(folder + "/tokenizer_config.json");
        const Tokenizer tokenizer(model.text(), config.text(), folder);
        std::vector<std::int64_t> ids, mask;
        for (std::string line; std::getline(std::cin, line);) {
            tokenizer.encode(clean_prompt(Json::parse(line, "prompt").string("prompt")), ids, mask);
            std::int64_t used = 0;
            for (std::int64_t one : mask) used += one;
            std::printf("%lld", static_cast<long long>(used));
            for (std::int64_t id : ids) std::printf(" %lld", static_cast<long long>(id));
            std::printf("\n");
        }
        return 0;
    } catch (const Error& error) {
        return std::fprintf(stderr, "error: %s\n", error.what()), 1;
    }
}
