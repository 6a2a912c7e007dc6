# Completion of superllama for fish: superllama completion fish | source

function __superllama_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -q current[1]; or set current ''
    set -l lines (superllama _complete $words $current 2>/dev/null)
    set -l pattern $lines[1]
    set -e lines[1]
    string join \n -- $lines
    switch "$pattern"
        case ''
        case '\*'
            __fish_complete_path $current
        case '*'
            __fish_complete_suffix (string trim --left --chars '*' -- $pattern)
    end
end

for command in @commands@
    complete --command $command --no-files --arguments '(__superllama_complete)'
end
