#compdef @commands@
# Completion of superllama for zsh: source <(superllama completion zsh), after compinit

_superllama() {
    local -a lines found kind
    local line pattern
    lines=("${(@f)$(superllama _complete "${(@Q)words[1,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null)}")
    pattern=$lines[1]
    for line in $lines[2,-1]; do
        found+=("${${line%%$'\t'*}//:/\\:}:${line#*$'\t'}")
    done
    [[ $PREFIX == -* ]] && kind=(-o)
    (( $#found )) && _describe $kind superllama found
    [[ -n $pattern ]] && _files -g "$pattern"
}

if [[ $funcstack[1] == _superllama ]]; then
    _superllama "$@"
else
    compdef _superllama @commands@
fi
