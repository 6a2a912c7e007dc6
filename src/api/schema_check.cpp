#include "api/schema_check.h"

#include "json-schema-to-grammar.h"
#include "json.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <set>
#include <stdexcept>
#include <string>

namespace superllama {

// Every keyword that constrains a value, and for which kind: any, numbers, strings, arrays, objects. Others are
// annotations, or places for definitions.
static const struct {
    const char * name;
    char kind;
} constraints[] = {
    { "$ref", 'g' },
    { "$dynamicRef", 'g' },
    { "allOf", 'g' },
    { "anyOf", 'g' },
    { "const", 'g' },
    { "else", 'g' },
    { "enum", 'g' },
    { "if", 'g' },
    { "not", 'g' },
    { "oneOf", 'g' },
    { "then", 'g' },
    { "type", 'g' },
    { "exclusiveMaximum", 'n' },
    { "exclusiveMinimum", 'n' },
    { "maximum", 'n' },
    { "minimum", 'n' },
    { "multipleOf", 'n' },
    { "maxLength", 's' },
    { "minLength", 's' },
    { "pattern", 's' },
    { "additionalItems", 'a' },
    { "contains", 'a' },
    { "items", 'a' },
    { "maxContains", 'a' },
    { "maxItems", 'a' },
    { "minContains", 'a' },
    { "minItems", 'a' },
    { "prefixItems", 'a' },
    { "unevaluatedItems", 'a' },
    { "uniqueItems", 'a' },
    { "additionalProperties", 'o' },
    { "dependencies", 'o' },
    { "dependentRequired", 'o' },
    { "dependentSchemas", 'o' },
    { "maxProperties", 'o' },
    { "minProperties", 'o' },
    { "patternProperties", 'o' },
    { "properties", 'o' },
    { "propertyNames", 'o' },
    { "required", 'o' },
    { "unevaluatedProperties", 'o' },
};

static const char * const every_kind = "gnsao";

// Walks a schema as upstream's builder does (common/json-schema.cpp), which decides by the keywords that it finds what
// kind of value a schema is for, and reads what belongs to that kind.
class schema_walk {
  public:
    explicit schema_walk(const common_json & root) : root(root) {}

    void node(const common_json & schema, const std::string & path);

  private:
    using names = std::initializer_list<const char *>;

    [[noreturn]] static void refuse(const std::string & path, const std::string & what) {
        throw std::invalid_argument("JSON schema at " + path + ": " + what);
    }

    static bool harmless(const common_json & schema, const std::string & keyword) {
        const common_json & value = schema.at(keyword);
        return (keyword == "uniqueItems" && value == false) || (keyword == "minItems" && value == 0) ||
               (keyword == "minLength" && value == 0) || (keyword == "minProperties" && value == 0);
    }

    // What constrains values of these kinds, and is not among what the converter reads for them, it drops.
    static void only(const common_json & schema, const std::string & path, const std::string & kinds, names read) {
        for (const auto & keyword : constraints) {
            bool matters = kinds.find(keyword.kind) != std::string::npos;
            for (const char * name : read) {
                matters = matters && std::string(name) != keyword.name;
            }
            if (matters && schema.contains(keyword.name) && !harmless(schema, keyword.name)) {
                refuse(path, std::string("\"") + keyword.name +
                                 "\" cannot be held here by the grammar that constrains the answer; leave it out, and "
                                 "check the answer yourself");
            }
        }
    }

    static void limit(const common_json & schema, const std::string & path, names keywords) {
        const int most = 2000; // upstream's parser of grammars takes more repetitions than this as "any number"
        for (const char * keyword : keywords) {
            if (schema.contains(keyword) && schema.at(keyword).is_number() && schema.at(keyword).get<double>() > most) {
                refuse(path, std::string("\"") + keyword + "\" is more than " + std::to_string(most) +
                                 ", which the grammar that constrains the answer cannot hold");
            }
        }
    }

    static double number(const common_json & schema, const char * keyword, double otherwise) {
        const bool has = schema.contains(keyword) && schema.at(keyword).is_number();
        return has ? schema.at(keyword).get<double>() : otherwise;
    }

    static void ordered(const std::string & path, const std::string & what, double least, double most) {
        if (least > most) {
            refuse(path, "the least " + what + " is more than the most: nothing has both");
        }
    }

    const common_json & resolved(const common_json & schema, const std::string & path) const;
    void reference(const common_json & schema, const std::string & path);
    void alternatives(const common_json & schema, const std::string & path);
    void all_of(const common_json & schema, const std::string & path);
    static void merge(const common_json & part, const std::string & path, std::set<std::string> & seen);
    void object(const common_json & schema, const std::string & path);
    void array(const common_json & schema, const std::string & path);
    void text(const common_json & schema, const std::string & path);
    void children(const common_json & list, const std::string & path);

    const common_json & root;
    std::set<std::string> references;
    std::set<std::string> rules; // of the grammar, of the schemas that are referred to
    size_t n_nodes = 0;
};

// ------------------------------------------------------------------------------------------- references

static const common_json * find(const common_json & root, const std::string & reference) {
    const common_json * at = &root;
    for (size_t from = 2; from <= reference.size();) {
        const size_t to = std::min(reference.find('/', from), reference.size());
        const std::string name = reference.substr(from, to - from);
        from = to + 1;
        if (at->is_object() && at->contains(name)) {
            at = &at->at(name);
        } else if (at->is_array() && !name.empty() && name.size() < 10 &&
                   name.find_first_not_of("0123456789") == std::string::npos && std::stoul(name) < at->size()) {
            at = &at->at((size_t) std::stoul(name));
        } else {
            return nullptr; // the builder's error
        }
    }
    return at;
}

static bool is_local_reference(const common_json & schema) {
    return schema.is_object() && schema.contains("$ref") && schema.at("$ref").is_string() &&
           schema.at("$ref").get<std::string>().compare(0, 2, "#/") == 0;
}

const common_json & schema_walk::resolved(const common_json & schema, const std::string & path) const {
    const common_json * at = &schema;
    for (int hops = 0; is_local_reference(*at); ++hops) {
        const common_json * next = find(root, at->at("$ref").get<std::string>());
        if (next == nullptr) {
            break;
        }
        if (hops == 64) {
            refuse(path, "\"$ref\" leads back to itself");
        }
        at = next;
    }
    return *at;
}

// What upstream makes of a name: runs of other characters are one "-".
static std::string rule_name(const std::string & name) {
    std::string rule;
    for (size_t i = 0; i < name.size(); ++i) {
        const auto is_plain = [](char c) {
            return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-';
        };
        if (is_plain(name[i])) {
            rule += name[i];
        } else if (i == 0 || is_plain(name[i - 1])) {
            rule += '-';
        }
    }
    return rule;
}

void schema_walk::reference(const common_json & schema, const std::string & path) {
    only(schema, path, every_kind, { "$ref" });
    resolved(schema, path); // throws where there is no end to it
    if (is_local_reference(schema)) {
        const std::string name = schema.at("$ref").get<std::string>();
        const common_json * target = find(root, name);
        if (target != nullptr && references.insert(name).second) {
            // upstream takes a rule of this name for the one that it has made already
            if (!rules.insert(rule_name(name)).second) {
                refuse(path, "\"$ref\" to " + name + " and to another one differ in special characters only");
            }
            node(*target, name);
        }
    }
}

// ------------------------------------------------------------------------------------------ alternatives

void schema_walk::children(const common_json & list, const std::string & path) {
    if (list.is_array()) {
        for (size_t i = 0; i < list.size(); ++i) {
            node(list.at(i), path + "/" + std::to_string(i));
        }
    }
}

void schema_walk::alternatives(const common_json & schema, const std::string & path) {
    const std::string keyword = schema.contains("oneOf") ? "oneOf" : "anyOf";
    const common_json & list = schema.at(keyword);
    bool all_say_what = list.is_array();
    for (size_t i = 0; all_say_what && i < list.size(); ++i) {
        const common_json & one = list.at(i);
        all_say_what = one.is_object() &&
                       (one.contains("type") || one.contains("const") || one.contains("enum") || one.contains("$ref"));
    }
    // a type beside alternatives adds nothing where each of them has its own
    if (all_say_what) {
        only(schema, path, every_kind, { keyword.c_str(), "type" });
    } else {
        only(schema, path, every_kind, { keyword.c_str() });
    }
    children(list, path + "/" + keyword);
}

// Of the parts of allOf upstream makes one object: the properties of all, each once.
void schema_walk::merge(const common_json & part, const std::string & path, std::set<std::string> & seen) {
    if (part.contains("type") && part.at("type") != "object" && part.contains("properties")) {
        refuse(path, "a part of allOf with properties can be of type object only");
    }
    if (part.contains("additionalProperties") && part.at("additionalProperties") != true) {
        refuse(path, "\"additionalProperties\" cannot be held in a part of allOf");
    }
    if (!part.contains("properties") || !part.at("properties").is_object()) {
        return;
    }
    for (const auto & entry : part.at("properties").items()) {
        if (!seen.insert(entry.k).second || entry.k.empty()) {
            refuse(path, "the property \"" + entry.k + "\" is in two parts of allOf, or has no name");
        }
    }
}

// Upstream merges the properties of objects, and intersects enumerations; other kinds leave no trace.
void schema_walk::all_of(const common_json & schema, const std::string & path) {
    only(schema, path, every_kind, { "allOf", "type" });
    const common_json & list = schema.at("allOf");
    children(list, path + "/allOf");
    std::set<std::string> names_seen;
    for (size_t i = 0; list.is_array() && i < list.size(); ++i) {
        const common_json & part = resolved(list.at(i), path);
        const bool merged = part.is_object() && (part.contains("properties") || part.contains("enum") ||
                                                 part.contains("anyOf") || part.contains("oneOf"));
        if (!merged) {
            refuse(path + "/allOf/" + std::to_string(i),
                   "only objects with properties, and enumerations, can be held in allOf");
        }
        merge(part, path + "/allOf/" + std::to_string(i), names_seen);
    }
}

// ------------------------------------------------------------------------------------------------ values

void schema_walk::object(const common_json & schema, const std::string & path) {
    only(schema, path, "go", { "type", "properties", "required", "additionalProperties" });
    const bool has_properties = schema.contains("properties") && schema.at("properties").is_object();
    if (schema.contains("required") && schema.at("required").is_array()) {
        const common_json & required = schema.at("required");
        for (size_t i = 0; i < required.size(); ++i) {
            const common_json & name = required.at(i);
            if (name.is_string() && !(has_properties && schema.at("properties").contains(name.get<std::string>()))) {
                refuse(path, "\"required\" names \"" + name.get<std::string>() + "\", which is not in \"properties\"");
            }
        }
    }
    if (has_properties) {
        for (const auto & entry : schema.at("properties").items()) {
            if (entry.k.empty() && path == "#") { // its rule would be that of the whole answer
                refuse(path, "a property of the whole has no name");
            }
            node(entry.v, path + "/properties/" + entry.k);
        }
    }
    if (schema.contains("additionalProperties")) {
        node(schema.at("additionalProperties"), path + "/additionalProperties");
    }
}

void schema_walk::array(const common_json & schema, const std::string & path) {
    const std::string keyword = schema.contains("items") ? "items" : "prefixItems";
    if (schema.contains(keyword) && schema.at(keyword).is_array()) {
        only(schema, path, "ga", { "type", keyword.c_str() });
        children(schema.at(keyword), path + "/" + keyword);
        return;
    }
    only(schema, path, "ga", { "type", keyword.c_str(), "minItems", "maxItems" });
    limit(schema, path, { "minItems", "maxItems" });
    ordered(path, "number of items", number(schema, "minItems", 0), number(schema, "maxItems", HUGE_VAL));
    if (schema.contains(keyword)) {
        node(schema.at(keyword), path + "/" + keyword);
    }
}

// The converter says nothing of a pattern that it cannot hold: the grammar of one is that of any string.
static bool pattern_is_held(const common_json & pattern) {
    common_json alone = common_json::object();
    alone["type"] = "string";
    alone["pattern"] = pattern;
    const std::string grammar = json_schema_to_grammar(common_chat_schema_from_json(alone));
    return ("\n" + grammar).find("\nroot ::= string\n") == std::string::npos;
}

void schema_walk::text(const common_json & schema, const std::string & path) {
    const std::string format = schema.contains("format") && schema.at("format").is_string()
                                   ? schema.at("format").get<std::string>()
                                   : std::string();
    const bool has_format =
        format == "date" || format == "time" || format == "date-time" || format.compare(0, 4, "uuid") == 0;
    if (schema.contains("pattern") && schema.at("pattern").is_string()) {
        only(schema, path, "gs", { "type", "pattern" });
        if (!pattern_is_held(schema.at("pattern"))) {
            refuse(path,
                   "the pattern " + schema.at("pattern").dump_safe() +
                       " cannot be held by a grammar, which knows groups, sets, repetitions, and ^ and $ at the ends");
        }
    } else if (has_format) {
        only(schema, path, "gs", { "type" });
    } else {
        only(schema, path, "gs", { "type", "minLength", "maxLength" });
        limit(schema, path, { "minLength", "maxLength" });
        ordered(path, "length", number(schema, "minLength", 0), number(schema, "maxLength", HUGE_VAL));
    }
}

void schema_walk::node(const common_json & schema, const std::string & path) {
    if (++n_nodes > 100000) {
        refuse("#", "it stands for more than 100000 schemas, each type of a list counted");
    }
    if (!schema.is_object()) {
        return; // true and false, or the builder's error
    }
    if (schema.contains("$ref")) {
        return reference(schema, path);
    }
    if (schema.contains("oneOf") || schema.contains("anyOf")) {
        return alternatives(schema, path);
    }
    if (schema.contains("type") && schema.at("type").is_array()) {
        const common_json & types = schema.at("type");
        for (size_t i = 0; i < types.size(); ++i) {
            common_json one = schema;
            one["type"] = types.at(i);
            node(one, path + "/type/" + std::to_string(i));
        }
        return;
    }
    if (schema.contains("const")) {
        return only(schema, path, every_kind, { "type", "const" });
    }
    if (schema.contains("enum")) {
        return only(schema, path, every_kind, { "type", "enum" });
    }

    const std::string type =
        schema.contains("type") && schema.at("type").is_string() ? schema.at("type").get<std::string>() : "";
    const bool has_properties = schema.contains("properties") ||
                                (schema.contains("additionalProperties") && schema.at("additionalProperties") != true);
    const bool merges = type == "string" || (!has_properties && (type.empty() || type == "object"));
    if (schema.contains("allOf") && merges) {
        return all_of(schema, path);
    }
    if (type == "object" || (type.empty() && has_properties)) {
        return object(schema, path);
    }
    if (type == "array" || (type.empty() && (schema.contains("items") || schema.contains("prefixItems")))) {
        return array(schema, path);
    }
    const bool like_text = schema.contains("pattern") || schema.contains("minLength") || schema.contains("maxLength") ||
                           schema.contains("format");
    if (type == "string" || (type.empty() && like_text)) {
        return text(schema, path);
    }
    if (type == "integer") {
        only(schema, path, "gn",
             { "type", schema.contains("minimum") ? "minimum" : "exclusiveMinimum",
               schema.contains("maximum") ? "maximum" : "exclusiveMaximum" });
        // an exclusive bound of whole numbers is the next one
        ordered(path, "value",
                std::max(number(schema, "minimum", -HUGE_VAL), number(schema, "exclusiveMinimum", -HUGE_VAL) + 1),
                std::min(number(schema, "maximum", HUGE_VAL), number(schema, "exclusiveMaximum", HUGE_VAL) - 1));
        for (const char * bound : { "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum" }) {
            if (std::abs(number(schema, bound, 0)) > 9e18) {
                refuse(path, std::string("\"") + bound + "\" has more than 64 bits");
            }
        }
        return;
    }
    const bool other = type == "number" || type == "boolean" || type == "null";
    only(schema, path, type == "number" ? "gn" : other ? "g" : every_kind, { "type" });
}

void check_schema(const common_json & schema) {
    schema_walk(schema).node(schema, "#");
}

void check_schemas(const common_json & answer, const common_json & tools) {
    if (!answer.is_null() && !answer.is_object()) { // upstream looks at objects only here
        throw std::invalid_argument("JSON schema: it has to be an object, not " + answer.dump_safe());
    }
    check_schema(answer);
    for (size_t i = 0; tools.is_array() && i < tools.size(); ++i) {
        const common_json & tool = tools.at(i);
        const common_json & function = tool.is_object() && tool.contains("function") ? tool.at("function") : tool;
        if (function.is_object() && function.contains("strict") && function.at("strict") == true &&
            function.contains("parameters")) {
            check_schema(function.at("parameters"));
        }
    }
}

} // namespace superllama
