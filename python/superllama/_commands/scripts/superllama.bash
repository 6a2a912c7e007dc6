# Completion of superllama for bash: source <(superllama completion bash)

_superllama() {
    # bash takes words apart at : and =, which names of models and values of flags have
    local -a words=()
    local i part n=0
    for ((i = 0; i <= COMP_CWORD; i++)); do
        part=${COMP_WORDS[i]}
        if ((n)) && [[ $part == [:=]* || ${words[n - 1]} == *[:=] ]]; then
            words[n - 1]+=$part
        else
            words[n++]=$part
        fi
    done
    # what bash replaces is the part behind them
    local last=${COMP_WORDS[COMP_CWORD]}
    [[ $last == [:=] ]] && last=
    local before=${words[n - 1]%"$last"}

    local pattern word about file
    COMPREPLY=()
    {
        IFS= read -r pattern
        while IFS=$'\t' read -r word about; do
            COMPREPLY+=("${word#"$before"}")
        done
    } < <(superllama _complete "${words[@]}" 2>/dev/null)
    [[ $before == *: ]] && pattern= # within a name of a model
    if [[ $pattern ]]; then
        # bash quotes what it is told are files, but the colons of names too
        local quote=${#COMPREPLY[@]}
        ((quote)) || compopt -o filenames 2>/dev/null
        while IFS= read -r file; do
            [[ -d $file ]] && ((quote)) && file+=/
            ((quote)) && printf -v file %q "$file"
            COMPREPLY+=("$file")
        done < <(compgen -f -X "!$pattern" -- "$last"; [[ $pattern == '*' ]] || compgen -d -- "$last")
    fi
}

complete -F _superllama @commands@
