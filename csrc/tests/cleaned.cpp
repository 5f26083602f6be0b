// cleaned reads prompts from stdin, one JSON string per line. It writes each cleaned prompt as hexadecimal UTF-8, with a
// star before a blank one, or the line of the error.
#include <cstdio>
#include <iostream>

#include "base/error.h"
#include "formats/json.h"
#include "text/cleaning.h"

int main() {
    using namespace greedy::core;
    for (std::string line; std::getline(std::cin, line);) {
        try {
            const std::string text = clean_prompt(Json::parse(line, "prompt").string("prompt"));
            if (is_blank(text)) std::printf("*");
            for (char c : text) std::printf("%02x", static_cast<unsigned char>(c));
            std::printf("\n");
        } catch (const Error& error) {
            std::printf("error: %s\n", error.what());
        }
    }
    return 0;
}
