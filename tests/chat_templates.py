"""Chat templates, each with another part of what templates in the field use of Jinja."""

from __future__ import annotations

TEMPLATES: dict[str, str | None] = {
    "own": None,  # the model's
    "no system": "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}[{{ m.role }}]{{ m.content | trim }}\n{% endfor %}{% if add_generation_prompt %}[model]{% endif %}",
    "parts only": "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "tool calls": "{%- for m in messages %}\n<{{ m.role }}>{{ m.content }}"
    "{%- for c in m.tool_calls or [] %}{{ c.function.name }}:{{ c.function.arguments | tojson }}{% endfor %}"
    "{%- endfor %}\n{% if add_generation_prompt %}<assistant>{% endif %}",
    "first and last": """
{%- for message in messages -%}
    {%- set head = '<|begin ' + message['role'] + '|>\n\n' -%}
    {%- set text = head + message['content'] | trim + '<|done|>' -%}
    {%- if loop.first %}{% set text = bos_token + text %}{% endif -%}
    {{- text -}}
    {%- if loop.last %}{{ loop.index }}/{{ loop.length }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|begin assistant|>\n\n' }}{% endif -%}""",
    "turns in turn": """
{%- if messages[0]['role'] == 'system' %}
    {%- set start = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}
{%- else %}
    {%- set start = '' %}{% set rest = messages %}
{%- endif %}
{%- for m in rest %}
    {%- if m['role'] == 'user' %}
        {{- '[ASK] ' + (start if loop.index0 == 0 else '') + m['content'] + ' [/ASK]' }}
    {%- elif m['role'] == 'assistant' %}
        {{- ' ' ~ m['content'] ~ eos_token }}
    {%- else %}
        {{- '[' ~ (m['role'] | upper) ~ ']' ~ m['content'] }}
    {%- endif %}
{%- endfor %}""",
    "other roles": """{{ bos_token }}{% for m in messages %}
{% set role = 'model' if m.role == 'assistant' else m.role %}
<turn>{{ role }}
{{ m.content | trim }}</turn>
{% endfor %}
{% if add_generation_prompt %}
<turn>model
{% endif %}""",
    "a namespace": """
{%- set ns = namespace(last=-1, n=0) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% set ns.n = ns.n + 1 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set text = m.content if m.content is string else '' %}
    {%- if m.role == 'assistant' and loop.index0 < ns.last and '</think>' in text %}
        {%- set text = text.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<' ~ m.role ~ ':' ~ loop.index0 ~ '>' ~ text ~ '\n' }}
{%- endfor %}
{{- ns.n }} of {{ messages | length }}
{%- if add_generation_prompt %}<assistant>
    {%- if enable_thinking is defined and enable_thinking %}<think>{% endif %}
{%- endif %}""",
    "a macro": """
{%- macro shown(content) -%}
    {%- if content is string -%}{{ content }}
    {%- elif content is iterable -%}
        {%- for part in content -%}{%- if part.type == 'text' -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}
    {%- else -%}(nothing){%- endif -%}
{%- endmacro -%}
{%- for m in messages -%}
    <|{{ m.role }}|>{{ shown(m.content) }}<|end|>{{ '\n' }}
{%- endfor -%}
{{ '<|assistant|>' if add_generation_prompt else eos_token }}""",
    "calls in tags": """
{%- for m in messages %}
    {{- '<|' + m.role + '|>\n' }}
    {%- if m.content %}{{ m.content }}{% endif %}
    {%- if m.tool_calls %}
        {%- for call in m.tool_calls %}
            {%- if call.function %}{% set call = call.function %}{% endif %}
            {{- '\n<call>\n{"name": "' ~ call.name ~ '", "arguments": ' }}
            {%- if call.arguments is string %}{{ call.arguments }}{% else %}{{ call.arguments | tojson }}{% endif %}
            {{- '}\n</call>' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}""",
    "answers of tools together": """
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<user>' }}{% endif %}
        {{- '<answer>' + m.content + '</answer>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '</user>' }}{% endif %}
    {%- else %}
        {{- '<' + m.role + '>' + (m.content or '') + '</' + m.role + '>' }}
    {%- endif %}
{%- endfor %}""",
    "filters": """
{%- for m in messages %}
{{- m.role | capitalize }}|{{ m.content | default('', true) | replace('a', 'A') | trim | length }}|
    {{- m.name | default('-') }};
{%- endfor %}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{{- users | length }} {{ (messages | map(attribute='role') | join(',')) }}
{{- ' ' }}{{ (messages | last).role }} {{ (messages | first).role }}""",
    "backwards": """
{%- for m in messages[::-1] %}{{ m.role[:2] }}{{ (m.content or '')[-2:] }};{% endfor %}
{{- messages[-1]['role'] }}{% for m in messages | reverse %}{{ loop.revindex }}{% endfor %}""",
    "a block": """
{%- for m in messages %}
{%- set said %}
<{{ m.role }}>
  {{ m.content }}
</{{ m.role }}>
{% endset %}
{{- said | trim }}{{ '\n' }}
{%- endfor %}""",
    "tests": """
{%- for m in messages %}
    {%- if m.content is none or m.content is not defined %}none
    {%- elif m.content is string %}string
    {%- elif m.content is sequence %}sequence{% endif %}
    {%- if m.name is defined and m.name %} named {{ m.name }}{% endif %}
    {%- if m.tool_calls is defined and m.tool_calls is iterable %} {{ m.tool_calls | length }} calls{% endif %}
    {%- if m['role'] in ['user', 'system'] and not m.role == 'system' %} U
    {%- elif m.role not in ['user', 'x'] %} O{% endif %};
{%- endfor %}{% if tools %}tools{% endif %}""",
    "methods of texts": """
{%- for m in messages %}
    {%- set text = (m.content if m.content else '') %}
    {{- m.role.upper() }}:{{ text.strip() }}:{{ text.startswith('H') }}:{{ text.endswith(' ') }}:
    {{- text.split(' ') | length }}
    {{- ':' + text.replace('\n', '\\n').rstrip() + '\n' }}
{%- endfor %}""",
    "numbers": """
{%- for m in messages %}{{ loop.index * 2 - 1 }}.{{ loop.index + 2 }}.{{ loop.index % 2 }}{{ m.content }} {% endfor %}
{%- for i in range(3) %}{{ i }}{% if not loop.last %},{% endif %}{% endfor %}""",
    "JSON": """
{%- for m in messages %}
    {{- m.role | tojson }}: {{ m.content | tojson }}
    {%- for call in m.tool_calls or [] %}
        {%- for name, value in call.function.arguments.items() %} {{ name }}={{ value | tojson }}{% endfor %}
    {%- endfor %}{{ '\n' }}
{%- endfor %}
{{- {'a': [1, 2.5, true, none], "é<&>'": "\\n"} | tojson }}""",
    "breaks": """
{%- for m in messages %}
    {%- if m.role == 'system' %}{% continue %}{% endif %}
    {{- '<' ~ m.role ~ '>' ~ (m.content or '') }}
    {%- if loop.index > 2 %}{% break %}{% endif %}
{%- endfor %}""",
    "channels": """
{%- for m in messages -%}
<|start|>{{ m.role }}
{%- if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m.content or '' }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}""",
}
